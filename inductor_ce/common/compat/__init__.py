"""Every private name of torch that inductor_ce uses, and what moves between its releases.

Nothing outside this folder imports what torch keeps private. A difference between releases is met here, by
probing for the capability where one can, so that no other file knows which torch it runs on.

    versions      which releases are supported
    graphs        nodes and their examples
    symbols       symbolic sizes
    dynamo        what Dynamo compiles
    inductor      Inductor's configuration, passes and lowerings
    templates     its Triton templates
    launches      how compiled Triton kernels are launched
    driver        CUDA's driver: graphs of launches
    loops         what Inductor computes in one loop
    stand_ins     fake tensors for what is being lowered
    distributed   process groups
"""
