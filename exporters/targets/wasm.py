"""CPUs in the browser, with onnxruntime-web."""

from epmq_deploy.exporters.targets.base import Target, WebRuntime

TARGET = Target(
    name="wasm",
    formats=("int8-expand",),
    why=(
        "in WebAssembly MatMulNBits unpacks its weights on every run; int8-expand does so once "
        "and multiplies in int8."
    ),
    web=WebRuntime("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
)
