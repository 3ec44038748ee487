"""GPUs in the browser, with onnxruntime-web."""

from epmq_deploy.exporters.targets.base import Target, WebRuntime

TARGET = Target(
    name="webgpu",
    formats=("matmulnbits", "fp16"),
    why=(
        "onnxruntime-web has WebGPU kernels for MatMulNBits of 2, 4 and 8 bits, blocks of 16 "
        "to 256, with and without zero points (measured with 1.30 on a software adapter); they "
        "refuse g_idx, which is never written."
    ),
    two_bit_containers=True,
    unverified="real GPUs; older versions of onnxruntime-web take 4 bits only.",
    web=WebRuntime("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"),
)
