"""A vLLM platform without a GPU and without vLLM's compiled kernels, for tests of what runs around them.

Front end, sockets, EngineCore, scheduler, executors, workers, image processor and vision tower are vLLM's
own. Only what lies in its CPU binary, which its wheel for GPUs does not have, is replaced. The attention of
the text model gives each token the mean of the values so far, so that what is generated depends on every
token of every image. Found by vLLM through the entry point `vllm.platform_plugins` when this folder is on
PYTHONPATH.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from bench.hops.model import larger_weights

_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_libraries: list[Any] = []
_values = torch.empty(0)  # of the layer that is being computed


def _remember(_key: torch.Tensor, value: torch.Tensor, *_rest: object) -> None:
    global _values
    _values = value


def _attend(
    _query: object, _keys: object, _cache: object, output: torch.Tensor, starts: torch.Tensor, *_rest: object
) -> None:
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        value = _values[start:end].float().mean(1, keepdim=True)
        count = torch.arange(1, end - start + 1).view(-1, 1, 1)
        output[start:end] = (value.cumsum(0) / count).to(output.dtype)


def _quick_gelu(out: torch.Tensor, x: torch.Tensor) -> None:
    out.copy_(x * torch.sigmoid(1.702 * x))


def _silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _zero(*given: Any) -> None:
    given[3].zero_()


# Schemas by which vLLM calls its CPU kernels, and what stands in for them. `m` came with 0.27.
_KERNELS: dict[str, Callable[..., Any]] = {
    "get_scheduler_metadata(int a, int b, int c, int d, Tensor e, ScalarType f, Tensor g, bool h, int i,"
    " str j, bool k, Tensor? l, str m='') -> Tensor": lambda *_: torch.zeros(1, dtype=torch.int32),
    "cpu_attn_reshape_and_cache(Tensor a, Tensor b, Tensor(c!) c, Tensor(d!) d, Tensor e, str f, float g,"
    " float h, str i) -> ()": _remember,
    "cpu_attention_with_kv_cache(Tensor q, Tensor k, Tensor v, Tensor(o!) o, Tensor e, Tensor f, float g,"
    " bool h, Tensor? i, int j, Tensor k2, float l, Tensor m, Tensor? n, Tensor? p, float r, float s, str t)"
    " -> ()": _attend,
    "init_cpu_memory_env(int[] a) -> ()": lambda *_: None,
    "compute_slot_mapping_kernel_impl(Tensor a, Tensor b, Tensor c, Tensor(d!) d, int e) -> ()": _zero,
    "gelu_quick(Tensor(o!) o, Tensor x) -> ()": _quick_gelu,
    "silu_and_mul(Tensor(o!) o, Tensor x) -> ()": _silu_and_mul,  # from 0.27 on
    "greedy_argmax(Tensor x) -> Tensor": lambda x: x.argmax(-1),  # from 0.33 on
}


def _define(namespace: str, schema: str, kernel: Callable[..., Any]) -> None:
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema)
    library.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")
    _libraries.append(library)


def _absent(*_: object) -> None:
    raise NotImplementedError("not in this platform")


def register() -> str:
    """The platform's class, by name; called in every process of vLLM, before anything else is imported."""
    if not _libraries:
        # torchvision's wheel is built for CUDA: where its operators can't be loaded it wants these declared.
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _define("torchvision", schema, _absent)
    return "tensorferry_dry_platform.DryPlatform"


def _stages_have_room() -> None:
    """For what comes from the pipeline's stage before: made by the warm-up that vLLM's CPU worker leaves out
    where nothing is compiled.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner.sync_and_gather_intermediate_tensors
    if gather.__module__ == __name__:
        return

    def gather_with_room(runner: Any, *given: Any, **named: Any) -> Any:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return gather(runner, *given, **named)

    GPUModelRunner.sync_and_gather_intermediate_tensors = gather_with_room


def _platform() -> type:
    from vllm.platforms.cpu import CpuPlatform

    class DryPlatform(CpuPlatform):  # type: ignore[misc]
        """vLLM's CPU platform, with one worker inside of EngineCore unless more are asked for."""

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            parallel = vllm_config.parallel_config
            asked = parallel.distributed_executor_backend
            method = os.environ.get(_METHOD, "spawn")
            super().check_and_update_config(vllm_config)
            os.environ[_METHOD] = method  # vLLM's takes spawn whatever is asked for
            if parallel.world_size == 1 and asked != "mp":
                parallel.distributed_executor_backend = "uni"

        @classmethod
        def import_kernels(cls) -> None:
            if not hasattr(torch.ops._C, "get_scheduler_metadata"):
                for schema, kernel in _KERNELS.items():
                    _define("_C", schema, kernel)

        @classmethod
        def get_attn_backend_cls(cls, *given: Any, **named: Any) -> str:
            # Here, since this is called where a model is made, before its weights are.
            larger_weights()
            _stages_have_room()
            backend: str = super().get_attn_backend_cls(*given, **named)
            return backend

    DryPlatform.__module__, DryPlatform.__qualname__ = __name__, "DryPlatform"
    return DryPlatform


def __getattr__(name: str) -> type:
    if name != "DryPlatform":
        raise AttributeError(name)
    globals()[name] = platform = _platform()
    return platform
