"""Compiles the kernels of a decode step for cards that are not there, and says what they would take of them.

`python -m buddy_kernels.gpu.offline` prints it for the models, dtypes, cards and batch sizes below. Needs Triton, whose
compiler and disassembler come along, and no GPU.
"""

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from buddy_kernels.gpu.decode_step import DecodeModel, DecodeStep
from buddy_kernels.gpu.launch import Capability, Launch, recorded
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments
from buddy_kernels.gpu.row_state import RowState
from buddy_kernels.step_weights import DecoderWeights, LayerWeights, Projection, RouterWeights

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
BATCH_SIZES = (1, 17, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
ALIGNMENT = 16
"""Of tensors in bytes, in which Triton compiles a kernel of its own; a fresh tensor has it."""
BLOCK_SIZE, TABLE_WIDTH, NUM_BLOCKS, NUM_POSITIONS = 16, 512, 4096, 8192
FEW_BYTES = 8
"""Of stack, which ptxas takes here and there rather than one more register."""
ROUTER_RANK, SMALL_FFN_DIVISOR = 32, 8


@dataclass(frozen=True, slots=True)
class ModelShape:
    name: str
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab: int
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    window: int | None = None


MODELS = (
    ModelShape("Llama-1B", 16, 2048, 32, 8, 64, 8192, 128256),
    ModelShape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    ModelShape("Llama-3-70B", 80, 8192, 64, 8, 128, 28672, 128256),
    ModelShape("Mistral-7B", 32, 4096, 32, 8, 128, 14336, 32000, window=4096),
    ModelShape("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, has_qkv_bias=True),
    ModelShape("Qwen2.5-7B", 28, 3584, 28, 4, 128, 18944, 152064, has_qkv_bias=True),
    ModelShape("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, has_qk_norm=True),
    ModelShape("odd", 3, 1000, 27, 3, 80, 2112, 5001, has_qkv_bias=True, has_qk_norm=True, window=100),
)
"""Models that are served, and one that fits no block."""


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What a kernel takes of a card. `stack_bytes` of local memory are where registers are spilled to; `products` are
    its tensor-core instructions."""

    model: str
    dtype: str
    capability: Capability
    num_rows: int
    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: int
    products: tuple[str, ...]


def step_launches(model: ModelShape, dtype: torch.dtype, num_rows: int, capability: Capability) -> list[Launch]:
    """The launches of a decode step of `num_rows`, all of them in order: without small FFNs, without adjustments."""
    with recorded(capability) as launches, torch.device("meta"):
        step_without_values(model, dtype, num_rows, has_small_ffns=False).run(adjusts=False)
    return launches


def varied_launches(model: ModelShape, dtype: torch.dtype, num_rows: int, capability: Capability) -> list[Launch]:
    """The launches of steps with and without small FFNs and adjustments, one after the other."""
    with recorded(capability) as launches, torch.device("meta"):
        # The knapsack of small FFNs is for models of up to 64 layers.
        for has_small_ffns in (False, True) if model.num_layers <= 64 else (False,):
            step = step_without_values(model, dtype, num_rows, has_small_ffns)
            for adjusts in (False, True):
                step.run(adjusts)
    return launches


def compiled(
    model: ModelShape, dtype: torch.dtype, num_rows: int, capability: Capability, is_plain: bool = False
) -> Iterator[KernelReport]:
    """A report on every kernel of a decode step; with `is_plain`, of one without small FFNs and adjustments."""
    made_of = step_launches if is_plain else varied_launches
    launches = made_of(model, dtype, num_rows, capability)
    distinct = {
        (launch.kernel, *launch.constants.items(), *map(_pointer, launch.tensors)): launch for launch in launches
    }
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    for launch in distinct.values():
        made = triton.compile(
            _source(launch), target=target, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        )
        registers, stack_bytes = _resources(made.asm["cubin"])
        opcodes = _opcodes(made.asm["cubin"])
        yield KernelReport(
            model.name,
            str(dtype).removeprefix("torch."),
            capability,
            num_rows,
            launch.kernel.__name__,
            registers,
            stack_bytes,
            made.metadata.shared,
            launch.num_warps,
            len(opcodes),
            tuple(sorted({opcode for opcode in opcodes if re.match(r"HMMA|HGMMA|UTC.*MMA", opcode)})),
        )


def step_without_values(model: ModelShape, dtype: torch.dtype, num_rows: int, has_small_ffns: bool) -> DecodeStep:
    """Of tensors on torch's default device that nobody has given values; all layers are the same one."""
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    num_actions = 3 if has_small_ffns else 2
    num_scores = (model.num_layers - 2) * (num_actions - 1)

    def projection(inputs: int, outputs: int, has_bias: bool = False) -> Projection:
        bias = torch.empty(outputs, dtype=dtype) if has_bias else None
        return Projection(torch.empty(outputs, inputs, dtype=dtype), bias)

    def norm(width: int = model.dim) -> Tensor:
        return torch.empty(width, dtype=dtype)

    small_dim = model.mlp_dim // SMALL_FFN_DIVISOR
    layer = LayerWeights(
        input_norm=norm(),
        post_norm=norm(),
        q=projection(model.dim, q_width, model.has_qkv_bias),
        k=projection(model.dim, kv_width, model.has_qkv_bias),
        v=projection(model.dim, kv_width, model.has_qkv_bias),
        o=projection(q_width, model.dim),
        gate=projection(model.dim, model.mlp_dim),
        up=projection(model.dim, model.mlp_dim),
        down=projection(model.mlp_dim, model.dim),
        q_norm=norm(model.head_dim) if model.has_qk_norm else None,
        k_norm=norm(model.head_dim) if model.has_qk_norm else None,
        window=model.window,
        small_gate=projection(model.dim, small_dim) if has_small_ffns else None,
        small_up=projection(model.dim, small_dim) if has_small_ffns else None,
        small_down=projection(small_dim, model.dim) if has_small_ffns else None,
    )
    head = projection(model.dim, model.vocab)
    weights = DecoderWeights(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        mlp_dim=model.mlp_dim,
        eps=1e-5,
        attention_factor=1.0,
        inv_freq=torch.empty(model.head_dim // 2),
        embeddings=head.weight,
        layers=[layer] * model.num_layers,
        norm=norm(),
        head=head,
    )
    router = RouterWeights(
        prior=torch.empty(num_scores),
        costs=torch.empty(model.num_layers, num_actions, dtype=torch.int64),
        forced=torch.empty(model.num_layers, dtype=torch.bool),
        sums=torch.empty(num_rows, kv_width, dtype=torch.float64),
        last_paths=torch.empty(num_rows, model.num_layers, dtype=torch.int8),
        down=Projection(torch.empty(ROUTER_RANK, 2 * kv_width), torch.empty(ROUTER_RANK)),
        up=Projection(torch.empty(num_scores, ROUTER_RANK), torch.empty(num_scores)),
    )
    cache = torch.empty(model.num_layers, NUM_BLOCKS, BLOCK_SIZE, model.num_kv_heads, model.head_dim, dtype=dtype)
    number = torch.empty(num_rows, dtype=torch.float64)
    adjustments = LogitAdjustments(
        presence=number,
        frequency=number,
        counts=torch.empty(num_rows, model.vocab, dtype=torch.int32),
        bias=torch.empty(num_rows, model.vocab),
        allowed=torch.empty(num_rows, triton.cdiv(model.vocab, 8), dtype=torch.uint8),
    )
    state = RowState.empty(num_rows, TABLE_WIDTH, model.num_layers, number.device)
    return DecodeStep(DecodeModel.of(weights, router, cache, cache, NUM_POSITIONS), state, adjustments)


def _pointer(tensor: Tensor | None) -> str:
    return "constexpr" if tensor is None else POINTERS[tensor.dtype]


def _source(launch: Launch) -> Any:
    """What Triton makes of the launch's arguments when it runs."""
    parameters = launch.kernel.params
    signature = dict.fromkeys(launch.kernel.arg_names, "constexpr")
    constants = {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    aligned = {}
    for place, tensor in enumerate(launch.tensors):
        signature[parameters[place].name] = _pointer(tensor)
        if tensor is None:
            constants[(place,)] = None
        elif not parameters[place].do_not_specialize_on_alignment:
            aligned[(place,)] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its bytes of stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin))
    assert found is not None
    return int(found[1]), int(found[2])


def _opcodes(cubin: bytes) -> list[str]:
    listing = _output_of(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)


def _output_of(tool: str, option: str, cubin: bytes) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        made = subprocess.run([tool, option, str(path)], capture_output=True, text=True)  # noqa: S603
    if made.returncode:
        raise RuntimeError(f"{tool} {option} ended with {made.returncode}: {made.stderr}")
    return made.stdout


def print_reports(reports: Iterable[KernelReport]) -> list[KernelReport]:
    """A line for each. Returns those that spill."""
    spilled = []
    row = "{:<12} {:<8} {:>3} {:>4} {:<16} {:>4} {:>5} {:>6} {:>5} {:>5} {}"
    print(row.format("model", "dtype", "sm", "rows", "kernel", "regs", "stack", "shared", "warps", "instr", "products"))
    for report in reports:
        major, minor = report.capability
        print(
            row.format(
                report.model,
                report.dtype,
                f"{major}{minor}",
                report.num_rows,
                report.kernel.strip("_").removesuffix("_kernel"),
                report.registers,
                report.stack_bytes,
                report.shared_bytes,
                report.num_warps,
                report.instructions,
                " ".join(report.products),
            ),
            flush=True,
        )
        if report.stack_bytes > FEW_BYTES:
            spilled.append(report)
    return spilled


def all_compiled() -> Iterator[KernelReport]:
    """Every model in bf16, the first in every dtype."""
    for model in MODELS:
        for dtype in DTYPES if model is MODELS[0] else DTYPES[:1]:
            for capability in CAPABILITIES:
                for num_rows in BATCH_SIZES:
                    yield from compiled(model, dtype, num_rows, capability)


def main() -> None:
    print_reports(all_compiled())


if __name__ == "__main__":
    main()
