"""``dittfast doctor``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import platform
import shutil

from dittfast.files import check_output, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast doctor``."""
    parser.add_argument(
        "--markdown", metavar="FILE", help="only write a table of what the backends take, here"
    )
    parser.epilog = "exit code: 0 if attention runs and is right on every device here, else 1"


def run(args) -> int:
    """Print the findings; 1 if a device has no backend that runs and agrees with the oracle."""
    if args.markdown is not None:
        check_output(args.markdown, (".md",))
        write_text(args.markdown, backends_markdown())
        print(f"wrote {args.markdown}")
        return 0
    _print_versions()
    healthy = _print_devices()
    _print_native()
    _print_triton()
    _print_content()
    print()
    print("attention works here" if healthy else "attention does not work here: see above")
    return 0 if healthy else 1


def _row(name: str, text: str) -> None:
    print(f"  {name:<14}{text}")


def _print_versions() -> None:
    import torch  # noqa: F401 (once loaded, it tells its build)

    from dittfast.environment import versions

    print("versions")
    for name, version in versions().items():
        _row(name, version or "not installed")
    _row("system", f"{platform.system()} {platform.machine()}")


def _print_devices() -> bool:
    """Each device with what every backend does on it; whether all devices are served."""
    from dittfast.attention import BACKENDS, choose_backend
    from dittfast.environment import describe_device, devices

    healthy = True
    for device in devices():
        about = describe_device(device)
        details = ", ".join(f"{v} {k}" for k, v in about.items() if k not in ("type", "name"))
        print(f"\n{device}  {about['name']}" + (f" ({details})" if details else ""))
        chosen = choose_backend(device)
        for name in BACKENDS:
            works, finding = check_backend(name, device)
            if name == chosen:
                finding += "; this is what backend='auto' runs here"
                healthy = healthy and works
            _row(name, finding)
    return healthy


def check_backend(name: str, device) -> tuple[bool, str]:
    """Whether a backend runs on a device and agrees with the oracle, and how that is known.

    A small local plan with text, 6 x 7 x 9 tokens, forward and backward, in each dtype the backend
    takes, against the dense oracle in fp64.
    """
    import torch

    from dittfast.attention import BACKENDS

    try:
        backend = BACKENDS[name]()
    except ImportError as error:
        return False, f"cannot be imported: {error}"
    right: list[str] = []
    findings: dict[str, list[str]] = {}
    broken = False
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        if name == "triton" and dtype == torch.bfloat16 and _interpreted():
            findings["not checked: Triton's interpreter gets bfloat16 wrong"] = [label]
            continue
        q = torch.zeros(1, 2, 8, 64, dtype=dtype, device=device)
        reasons = backend.not_supported_reasons(q, q, q)
        if reasons:
            findings.setdefault("cannot run: " + "; ".join(reasons), []).append(label)
            continue
        try:
            _check_backend(name, device, dtype)
            right.append(label)
        except Exception as error:  # whatever a driver or a compiler throws is a finding
            broken = True
            reason = f"FAILS: {' '.join(str(error).split())[:200]}"
            findings.setdefault(reason, []).append(label)
    told = [
        finding if len(labels) == len(dtypes) else f"{', '.join(labels)} {finding}"
        for finding, labels in findings.items()
    ]
    if right:
        told.insert(0, f"{', '.join(right)} right forward and backward")
    return bool(right) and not broken, "; ".join(told)


def _check_backend(name: str, device, dtype) -> None:
    import torch

    from dittfast.attention import attend
    from dittfast.layout import Layout
    from dittfast.methods import METHODS
    from dittfast.testing import assert_within_budget, attention_inputs, eager_attention

    layout = Layout.video(6, 7, 9, text=5)
    plan = METHODS["local"](window=3, tile=(2, 4, 4)).plan(layout)
    inputs = attention_inputs(1, 2, layout.num_tokens, 64, dtype=dtype, device=device)
    mask = plan.to_dense_mask().to(device)
    results = []
    for backend, cast in ((name, dtype), ("eager", dtype), ("reference", torch.float64)):
        q, k, v, grad_out = (x.to(cast).requires_grad_() for x in inputs)
        if backend == "eager":
            out = eager_attention(q, k, v, mask, 64**-0.5)
        else:
            out = attend(q, k, v, plan, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad_out.detach())))
    for label, actual, eager, exact in zip(("out", "dq", "dk", "dv"), *results):
        assert_within_budget(label, actual.detach(), exact.detach(), eager.detach())


def _print_native() -> None:
    from dittfast.kernels.native_build import BuildError, library

    print("\nnative CPU kernel")
    native = library()
    if isinstance(native, BuildError):
        _row("missing", f"{native}; until then attention on CPUs takes the slower 'cpu' backend")
        return
    _row("built with", native.compiler)
    _row("instructions", native.instructions)
    _row("kept in", str(native.folder or "no folder: every process compiles it again (see above)"))


def backends_markdown() -> str:
    """docs/backends.md: what each backend takes, as its own checks answer."""
    from dittfast.attention import BACKENDS

    rows = [
        "# Backends",
        "",
        "Printed by `dittfast doctor --markdown docs/backends.md` from the checks that refuse",
        "tensors. All run forward and backward, under any plan, at any length.",
        '`backend="auto"` takes `triton` on GPUs and `native` on CPUs (`cpu` where there is no C',
        "compiler, and for fp64), and PyTorch's own attention where the plan leaves nothing out. A",
        "backend that is named runs or raises.",
        "",
        "| backend | devices | dtypes | head dims up to 512 |",
        "|---|---|---|---|",
    ]
    for name, load in BACKENDS.items():
        devices, dtypes, dims = _taken(load())
        rows.append(f"| `{name}` | {devices} | {dtypes} | {dims} |")
    return "\n".join(rows) + "\n"


def _taken(backend) -> tuple[str, str, str]:
    """Devices, dtypes and head dims that a backend does not refuse, tried on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def takes(device="cpu", dtype=torch.float32, dim=64) -> bool:
        q = torch.empty(1, 1, 8, dim, dtype=dtype, device=device)
        # Triton asks the GPU, too, which a fake tensor does not have.
        refuses = getattr(backend, "tensor_reasons", backend.not_supported_reasons)
        return not refuses(q, q, q)

    with FakeTensorMode(allow_non_fake_inputs=True):
        devices = [d for d in ("cuda", "cpu") if takes(d)]
        if not devices:
            return "none here", "", ""
        on = devices[0]
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        names = [str(d).removeprefix("torch.") for d in dtypes if takes(on, d)]
        dims = [dim for dim in range(1, 513) if takes(on, torch.float32, dim)]
    return ", ".join(devices), ", ".join(names), _span(dims)


def _span(numbers: list[int]) -> str:
    """``[16, 32, 48]`` as ``16 to 48 in steps of 16``."""
    step = numbers[1] - numbers[0]
    if numbers != list(range(numbers[0], numbers[-1] + 1, step)):
        return ", ".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}" + (f" in steps of {step}" if step > 1 else "")


def _print_triton() -> None:
    import importlib.util

    import torch

    print("\ntriton")
    if importlib.util.find_spec("triton") is None:
        _row("missing", "not installed; without it GPUs have only the reference backend")
        return
    _row("interpreter", "on (slow, for tests)" if _interpreted() else "off")
    _row("compiler", _compiler_finding())
    if not torch.accelerator.is_available():
        _row("GPU", f"none visible; torch is built for {_torch_build(torch)}")


def _interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, as Triton itself decides it."""
    import os

    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _torch_build(torch) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPUs only"


def _compiler_finding() -> str:
    """Whether the forward kernel compiles, for GPUs that need not be here."""
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    try:
        from dittfast.kernels.compile_report import report

        made = list(report(targets, ("forward",), (128,), ("fp16",), ("general",)))
    except Exception as error:  # a broken toolchain is a finding
        return f"FAILS: {' '.join(str(error).split())[:200]}"
    return f"the forward kernel compiles for {', '.join(x.target for x in made)}"


def _print_content() -> None:
    from dittfast.config import presets
    from dittfast.methods import METHODS
    from dittfast.pipelines.runs.sources import sample_models

    print("\ncontents")
    _row("methods", ", ".join(METHODS))
    _row("presets", ", ".join(presets()) or "none")
    lines = []
    for name, folder in sample_models().items():
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        lines.append(f"{name} ({size / 1e6:.1f} MB)")
    _row("sample models", ", ".join(lines) or "none")
    _row("video", _video_finding())


def _video_finding() -> str:
    try:
        import imageio_ffmpeg

        return f".mp4 with ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"
    except (ImportError, RuntimeError, OSError):
        return ".mp4 with ffmpeg" if shutil.which("ffmpeg") else "no ffmpeg: .gif only"
