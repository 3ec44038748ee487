"""Attention as one operator computes what its parts computed, and nothing else becomes one."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.version_converter import convert_version
from tiny_families import ARCHITECTURES, SIZE, TEXT
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from epmq_deploy.exporters.formats.int8_expand import FORMAT
from epmq_deploy.exporters.lowering.attention import ATTENTION_OPSET, fuse_attention, has_attention

SETTINGS = {
    "bert": ("bert", TEXT, False),
    "distilbert": ("distilbert", ARCHITECTURES["distilbert"].settings, False),
    "clip": ("clip_text_model", TEXT | {"eos_token_id": 3}, False),
    "vit": ("vit", ARCHITECTURES["vit"].settings, True),
    "dinov2": ("dinov2", ARCHITECTURES["dinov2"].settings, True),
}
BLOCKS = 2
BATCH, TOKENS, HEADS, WIDTH = 3, 5, 2, 4


class Positional(nn.Module):
    """A model that takes its inputs in order and gives one output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Last hidden state."""
        output: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))[0]
        return output


class ByHand(nn.Module):
    """Attention as models write it, in variants."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """``[B, S, H * D]`` and a mask to the same shape and, perhaps, more."""
        queries, keys, values = (
            (x * factor).view(-1, TOKENS, HEADS, WIDTH).transpose(1, 2) for factor in (1, 2, 3)
        )
        if self.variant == "queries shared":
            queries = (x[:1] + 1).view(-1, TOKENS, HEADS, WIDTH).transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        if self.variant != "unscaled":
            scores = scores * (-0.3 if self.variant == "negative" else 0.3)
        if self.variant not in ("unmasked", "unscaled"):
            scores = scores + mask
        shares = torch.softmax(scores, 2 if self.variant == "over queries" else -1)
        mixed = shares @ values
        if self.variant == "left open":
            return (mixed,)
        flat = mixed.transpose(1, 2).reshape(-1, TOKENS, HEADS * WIDTH)
        return (flat, shares) if self.variant == "shares read" else (flat,)


def traced(model: nn.Module, inputs: dict[str, Tensor], *, any_batch: bool) -> ir.Model:
    """Its graph, of the version that has the operator, without it."""
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if any_batch else None
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=21,
            input_names=tuple(inputs),
            dynamic_shapes=shapes and (shapes,),
            verbose=False,
        )
    assert program is not None
    convert_version(program.model, ATTENTION_OPSET)
    return program.model


def computed(graph: ir.Model, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """All outputs in onnxruntime."""
    proto = ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}
    feed = {name: value.numpy() for name, value in inputs.items() if name in used}
    outputs: list[np.ndarray] = session.run(None, feed)
    return outputs


@pytest.mark.parametrize("name", SETTINGS)
def test_every_block_of_a_model_has_one(name: str) -> None:
    kind, settings, image = SETTINGS[name]
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    model.set_attn_implementation("eager")
    inputs: dict[str, Tensor]
    if image:
        inputs = {"pixel_values": torch.randn(BATCH, 3, SIZE, SIZE)}
    else:
        mask = torch.ones(BATCH, 9, dtype=torch.long)
        mask[0, 5:] = mask[1, 2:] = 0
        inputs = {"input_ids": torch.randint(4, 9, (BATCH, 9)), "attention_mask": mask}
    graph = traced(Positional(model, tuple(inputs)), inputs, any_batch=True)
    (parts,) = computed(graph, inputs)
    assert fuse_attention(graph.graph) == BLOCKS
    RemoveUnusedNodesPass()(graph)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    counts = Counter(node.op_type for node in graph.graph)
    assert (counts["Attention"], counts["Softmax"]) == (BLOCKS, 0)
    (whole,) = computed(graph, inputs)
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize(
    ("variant", "mask_shape", "count"),
    [
        ("masked", (1, 1, TOKENS, TOKENS), 1),
        ("masked", (BATCH, HEADS, TOKENS, TOKENS), 1),
        ("unmasked", (1, 1, TOKENS, TOKENS), 1),
        ("unscaled", (1, 1, TOKENS, TOKENS), 1),
        # The kernel does not repeat a mask along queries.
        ("masked", (1, 1, 1, TOKENS), 0),
        ("shares read", (1, 1, TOKENS, TOKENS), 0),
        ("over queries", (1, 1, TOKENS, TOKENS), 0),
        ("left open", (1, 1, TOKENS, TOKENS), 0),
        # onnxruntime refuses such a scale, and repeats no queries.
        ("negative", (1, 1, TOKENS, TOKENS), 0),
        ("queries shared", (1, 1, TOKENS, TOKENS), 0),
    ],
)
def test_only_what_the_operator_can_compute(
    variant: str, mask_shape: tuple[int, ...], count: int
) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(BATCH, TOKENS, HEADS * WIDTH), "mask": torch.randn(mask_shape)}
    graph = traced(ByHand(variant), inputs, any_batch=False)
    parts = computed(graph, inputs)
    assert fuse_attention(graph.graph) == count
    RemoveUnusedNodesPass()(graph)
    for one, other in zip(computed(graph, inputs), parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_what_has_no_name_may_be_of_any_size() -> None:
    shapes = {"x": torch.randn(BATCH, TOKENS, HEADS * WIDTH), "mask": torch.randn(TOKENS, TOKENS)}
    shapes["mask"] = shapes["mask"][None, None]
    graph = traced(ByHand("masked"), shapes, any_batch=False)
    assert has_attention(graph.graph)
    assert FORMAT.usual_opset(graph) == ATTENTION_OPSET
    for node in graph.graph:
        if node.op_type == "Reshape":
            size = ir.Shape([None, *node.outputs[0].shape[1:]])
            node.outputs[0].shape = size
            node.inputs[0].shape = ir.Shape([None, *node.inputs[0].shape[1:]])
    assert not has_attention(graph.graph)
    assert FORMAT.usual_opset(graph) == 21


@pytest.mark.parametrize(("opset", "count"), [(None, 2), (21, 0), (23, 2)])
def test_int8_expand_has_them_from_their_version_on(
    outside_case: Any, tools: Any, tmp_path: Path, opset: int | None, count: int
) -> None:
    graphs = tools.export(outside_case, ["matmulnbits", "int8-expand"], tmp_path, opset=opset)
    used = {}
    for graph in graphs:
        model = onnx.load(str(graph.path))
        versions = {entry.domain: entry.version for entry in model.opset_import}
        assert versions[""] == graph.opset
        used[graph.format] = [node.op_type for node in model.graph.node].count("Attention")
    assert used == {"fp32": 0, "matmulnbits": 0, "int8-expand": count}
