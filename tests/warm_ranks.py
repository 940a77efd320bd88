"""What the fork server of ranks does before it forks: all imports, and what torch does once a process.

The first compilation of a process takes as long as five others; that of logits that are a DTensor is the
first of everything here. Its mesh has a size that no test has, for torch caches by meshes. The keys of
caches are of the text of all of torch and Triton, for which each process would read them.

A build of torch for GPUs has threads of autograd after the first backward, also where there is no GPU, and
then forbids it to what is forked. There only the imports are done before.
"""

import dtensor_cases
import torch
import torch.distributed as dist
from dtensor_cases import Setup
from harness import clean_slate, collect_seldom
from torch._inductor.codecache import CacheBase, torch_key
from torch.testing._internal.distributed.fake_pg import FakeStore

torch.set_num_threads(1)  # a pool of threads would not outlive the fork
if not torch.backends.cuda.is_built():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    with clean_slate():
        dtensor_cases.run("plain", Setup((3,)))
    dist.destroy_process_group()
    torch_key()
    CacheBase.get_system()
collect_seldom()
