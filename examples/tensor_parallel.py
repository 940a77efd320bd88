"""Train the quickstart's model on a mesh, FSDP2 x tensor parallelism, and compare it with one rank.

    torchrun --nproc-per-node 4 examples/tensor_parallel.py

Two ranks share the vocabulary and the sequence, the others rows of the batch. Runs on GPUs (NCCL) where
there are as many as ranks, else on the CPU (gloo). The model (transformer.py) is plain PyTorch:
`parallelize_module` gives each rank a block of the head's columns, and labels come as a DTensor that every
rank holds. Nothing else says that the vocabulary is sharded. Prints what `inductor_ce.explain` found, and the
losses of both runs.

NOTE What is compiled
The head with the loss, and each block. So the head is computed in chunks on each rank's columns; of a chunk
the ranks gather a few numbers a row. A loss that is compiled alone would be given logits that are made.
Blocks are checkpointed outside of what is compiled. With the checkpoint inside, torch 2.13 fails by itself
for tensor-parallel blocks: their graph would save a mesh for the backward ("expected all
tensors_saved_with_vc_check to be Tensors"). Meshes of one dimension are taken once: a graph that meets two of
them may not be divided into forward and backward ("Node tangents_2 was invalid, but is output").
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import inductor_ce
from corpus import token_file
from train import Sizes, sample_batches, split
from transformer import Transformer

TP = 2  # ranks that share the vocabulary


def main() -> None:
    arguments = parse_arguments()
    device = device_of_this_rank()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    shape = (dist.get_world_size() // TP, TP)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
    dp, tp = mesh["dp"], mesh["tp"]
    sizes = Sizes.for_device(device.type)
    if dist.get_rank() == 0:
        token_file(arguments.out, sizes.V)
    dist.barrier()
    tokens = torch.load(token_file(arguments.out, sizes.V), weights_only=True)
    batches = [batch.to(device) for batch in sample_batches(tokens, sizes, arguments.steps)]
    with inductor_ce.install():
        alone = train(make_model(sizes, device), batches) if dist.get_rank() == 0 else []
        dist.barrier()
        model = sharded(make_model(sizes, device), dp, tp)
        together = train(model, [batch.chunk(dp.size())[dp.get_local_rank()] for batch in batches], dp, tp)
        report = explained(model, sizes, dp, tp)
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


def sharded(model: Transformer, dp: DeviceMesh, tp: DeviceMesh) -> Transformer:
    """The model with rows of the batch over `dp`, and sequences, heads and vocabulary over `tp`."""
    whole, by_sequence = Replicate(), Shard(1)
    layout = {
        "token_embedding": RowwiseParallel(input_layouts=whole, output_layouts=whole),
        "blocks.0": PrepareModuleInput(
            input_layouts=(whole,), desired_input_layouts=(by_sequence,), use_local_output=True
        ),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=by_sequence, output_layouts=Shard(-1), use_local_output=False),
    }
    layout_of_block = {
        "attention_norm": SequenceParallel(),
        "qkv": ColwiseParallel(input_layouts=by_sequence),
        "attention_out": RowwiseParallel(output_layouts=by_sequence),
        "mlp_norm": SequenceParallel(),
        "mlp.0": ColwiseParallel(input_layouts=by_sequence),
        "mlp.2": RowwiseParallel(output_layouts=by_sequence),
    }
    parallelize_module(model, tp, layout)
    for i, block in enumerate(model.blocks):
        parallelize_module(block, tp, layout_of_block)
        model.blocks[i] = fully_shard(checkpoint_wrapper(torch.compile(block)), mesh=dp)
    fully_shard(model, mesh=dp)
    model.loss = torch.compile(model.loss)
    return model


def on_every_rank(y: torch.Tensor, tp: DeviceMesh) -> DTensor:
    return DTensor.from_local(y, tp, [Replicate()], run_check=False)


def train(
    model: Transformer,
    batches: list[torch.Tensor],
    dp: DeviceMesh | None = None,
    tp: DeviceMesh | None = None,
) -> list[float]:
    """The losses of one step on each batch, of which ranks have as many rows each: FSDP takes means."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), foreach=False)
    loss_of = torch.compile(model) if dp is None else model  # parts of the sharded one are compiled
    losses = []
    for batch in batches:
        x, y = split(batch)
        loss = loss_of(x, y if tp is None else on_every_rank(y, tp))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() if dp is None else mean_over_ranks(loss, dp))
    return losses


def mean_over_ranks(loss: DTensor, dp: DeviceMesh) -> float:
    mean = loss.full_tensor().detach()
    dist.all_reduce(mean, group=dp.get_group())
    return mean.item() / dp.size()


def explained(model: Transformer, sizes: Sizes, dp: DeviceMesh, tp: DeviceMesh) -> inductor_ce.Report:
    """What is found in the head and the loss, of hidden states as the blocks give them."""
    rows, device = sizes.B // dp.size(), model.head.weight.device
    part = torch.randn(rows, sizes.S // tp.size(), sizes.D, device=device, requires_grad=True)
    h = DTensor.from_local(part, tp, [Shard(1)], run_check=False)
    y = torch.zeros(rows, sizes.S, dtype=torch.int64, device=device)
    model.unshard()
    return inductor_ce.explain(model.loss, h, on_every_rank(y, tp))


def comparison(alone: list[float], together: list[float]) -> str:
    lines = [f"{'loss at step':16}{'one rank':>16}{f'{dist.get_world_size()} ranks':>16}"]
    lines += [f"{i:<16}{a:>16.6f}{b:>16.6f}" for i, (a, b) in enumerate(zip(alone, together, strict=True))]
    largest = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    return "\n".join([*lines, "", f"Largest difference: {largest:.2e}."])


if __name__ == "__main__":
    main()
