"""Naming the nodes of layers, low-bit and float alike, after their modules."""

from collections import Counter

import onnx_ir as ir

from epmq_deploy.exporters.compat import module_of
from epmq_deploy.exporters.lowering.layers import (
    LAYER_KEY,
    add_initializer,
    constant,
    layer_of,
    low_bit_nodes,
    run_name,
)

# The second where a model of tasks holds the model.
_BACKBONES = ("backbone.", "model.backbone.")
_FLOAT_LAYERS = ("MatMul", "Gemm", "Conv", "Gather")
_SUFFIXES = ((1, "codes"), (2, "scales"), (3, "zero_points"))


class NameLayers(ir.passes.InPlacePass):
    """Give MatMulNBits nodes and their initializers their layers' names.

    Equal initializers of different layers, which the optimizer merged into one, get one each
    again, and so do all runs of one layer: onnxruntime does not fuse a QDQ layer whose initializers
    are shared. ``ShareRuns`` undoes that where sharing does no harm.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name them."""
        nodes = list(low_bit_nodes(model.graph))
        runs: Counter[str] = Counter()
        for node in nodes:
            layer = node.metadata_props[LAYER_KEY]
            runs[layer] += 1
            node.name = run_name(layer, runs[layer])
            if not node.outputs[0].is_graph_output():
                node.outputs[0].name = f"{node.name}.product"
            for index, suffix in _SUFFIXES:
                array = constant(node, index)
                if array is not None:
                    tensor = ir.Tensor(array, name=f"{node.name}.{suffix}")
                    node.replace_input_with(index, add_initializer(model.graph, tensor))
        return ir.passes.PassResult(model, modified=bool(nodes))


class ShareRuns(ir.passes.InPlacePass):
    """Have all MatMulNBits nodes of one layer read the first one's initializers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Share them."""
        first: dict[str, ir.Node] = {}
        modified = False
        for node in low_bit_nodes(model.graph):
            original = first.setdefault(layer_of(node.name), node)
            if original is node:
                continue
            modified = True
            for index, _ in _SUFFIXES:
                if constant(node, index) is not None:
                    model.graph.initializers.pop(str(node.inputs[index].name))  # type: ignore[union-attr]
                    node.replace_input_with(index, original.inputs[index])
        return ir.passes.PassResult(model, modified=modified)


class NameFloatLayers(ir.passes.InPlacePass):
    """Give nodes of float layers their modules' names, so that both kinds are found alike.

    Before: torch's metadata is still there.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name them."""
        modified = False
        for node in model.graph:
            if node.op_type not in _FLOAT_LAYERS:
                continue
            weight = node.inputs[0 if node.op_type == "Gather" else 1]
            if weight is None or weight.const_value is None:
                continue
            module = module_of(node)
            prefix = next((each for each in _BACKBONES if (module or "").startswith(each)), None)
            if module is not None and prefix is not None:
                node.name = module.removeprefix(prefix)
                modified = True
        return ir.passes.PassResult(model, modified=modified)
