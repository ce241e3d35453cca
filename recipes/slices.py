"""Tensor parallelism: every layer of the GPT cut into slices, one for each process of a group.

Owns which weight is cut along which dimension. Promises the values of the uncut model up to the
order of summation, and that every parameter becomes a DTensor, so that an optimizer and the norm
of the gradients treat them all alike. Refuses a number of processes that cannot share the heads.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from gpt import GPT, Block
from run_config import RecipeError


def slice_layers(model: GPT, mesh: DeviceMesh) -> None:
    """Cut the layers of a model among the processes of a mesh, in place.

    Raises:
        RecipeError: the processes cannot share the attention heads evenly.
    """
    for block in model.blocks.values():
        assert isinstance(block, Block)
        if block.heads % mesh.size():
            raise RecipeError(
                f"model.heads is {block.heads}; {mesh.size()} processes cannot share that evenly.\n"
                f"Make it a multiple of {mesh.size()}, or start fewer processes."
            )
        # Columns, then rows: what is between stays on its process, and one sum ends each pair.
        plan = {
            "query_key_value": ColwiseParallel(),
            "attention_out": RowwiseParallel(),
            "mlp_in": ColwiseParallel(),
            "mlp_out": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
    whole = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, {"token_embedding": whole, "head": whole})
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # too small to cut
            distribute_module(module, mesh, input_fn=_enter, output_fn=_leave)


def _enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return DTensor.from_local(inputs[0], mesh, [Replicate()])


def _leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.to_local()
