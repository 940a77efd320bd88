"""Train the quickstart's model with its head sharded over the vocabulary, and compare it with one rank.

    torchrun --nproc-per-node 4 examples/tensor_parallel.py

Runs on GPUs (NCCL) where there are as many as ranks, else on the CPU (gloo). The model (transformer.py) is
plain PyTorch; `parallelize_module` gives each rank a block of the head's columns, and the labels come as a
DTensor that every rank holds. Nothing else says that the vocabulary is sharded. Prints what
`inductor_ce.explain` found, and the losses of both runs.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import inductor_ce
from corpus import token_file
from train import Sizes, sample_batches, split
from transformer import Transformer


def main() -> None:
    arguments = parse_arguments()
    device = device_of_this_rank()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    sizes = Sizes.for_device(device.type)
    if dist.get_rank() == 0:
        token_file(arguments.out, sizes.V)
    dist.barrier()
    tokens = torch.load(token_file(arguments.out, sizes.V), weights_only=True)
    batches = [batch.to(device) for batch in sample_batches(tokens, sizes, arguments.steps)]
    with inductor_ce.install():
        alone = train(make_model(sizes, device), batches) if dist.get_rank() == 0 else []
        dist.barrier()
        model = sharded(make_model(sizes, device), mesh)
        together = train(model, batches, mesh)
        x, y = split(batches[0])
        report = inductor_ce.explain(model, x, on_every_rank(y, mesh))
    if dist.get_rank() == 0:
        print(report, comparison(alone, together), sep="\n\n")
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: %(default)s)")
    out = Path("build/quickstart")
    parser.add_argument("--out", type=Path, default=out, help="folder of the corpus (default: %(default)s)")
    return parser.parse_args()


def device_of_this_rank() -> torch.device:
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def make_model(sizes: Sizes, device: torch.device) -> Transformer:
    """The same weights in every process and run."""
    torch.manual_seed(0)
    model = Transformer(sizes.V, sizes.D, sizes.S, sizes.layers, sizes.heads, tied=False)
    return model.to(device)


def sharded(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """The model with a block of the head's columns on each rank, and logits that stay so."""
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return parallelize_module(model, mesh, {"head": head})


def on_every_rank(y: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(y, mesh, [Replicate()], run_check=False)


def train(model: Transformer, batches: list[torch.Tensor], mesh: DeviceMesh | None = None) -> list[float]:
    """The losses of one step on each batch."""
    loss_of = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), foreach=False)
    losses = []
    for batch in batches:
        x, y = split(batch)
        loss = loss_of(x, y if mesh is None else on_every_rank(y, mesh))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss if mesh is None else loss.full_tensor()).item())
    return losses


def comparison(alone: list[float], together: list[float]) -> str:
    lines = [f"{'loss at step':16}{'one rank':>16}{f'{dist.get_world_size()} ranks':>16}"]
    lines += [f"{i:<16}{a:>16.6f}{b:>16.6f}" for i, (a, b) in enumerate(zip(alone, together, strict=True))]
    largest = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    return "\n".join([*lines, "", f"Largest difference: {largest:.2e}."])


if __name__ == "__main__":
    main()
