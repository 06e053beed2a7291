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
    parser.add_argument(
        "--engines",
        action="store_true",
        help="try backends, too, whose first call compiles or imports for many seconds",
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
    healthy = _print_devices(args.engines)
    _print_capabilities()
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


def _print_devices(slow: bool) -> bool:
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
            works, finding = check_backend(name, device, slow)
            if name == chosen:
                finding += "; this is what backend='auto' runs here"
                healthy = healthy and works
            _row(name, finding)
    return healthy


def check_backend(name: str, device, slow: bool = False) -> tuple[bool, str]:
    """Whether a backend runs on a device and agrees with the oracle, and how that is known.

    A small local plan with text, 6 x 7 x 9 tokens, forward and, where it has that, backward, in
    each dtype the backend takes, against the dense oracle in fp64.

    Args:
        slow: try those, too, whose first call takes many seconds.
    """
    import torch

    from dittfast.attention import BACKENDS, not_supported_reasons

    try:
        backend = BACKENDS[name]()
    except ImportError as error:
        return False, f"cannot be imported: {error}"
    right: dict[str, list[str]] = {}
    findings: dict[str, list[str]] = {}
    broken = False
    plan = _small_plan()
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        q = torch.zeros(1, 2, plan.num_queries, 64, dtype=dtype, device=device)
        refused = [not_supported_reasons(name, q, q, q, plan)]
        refused.append(refused[0] or not_supported_reasons(name, *[q.requires_grad_()] * 3, plan))
        if refused[0]:
            findings.setdefault("cannot run: " + "; ".join(refused[0]), []).append(label)
            continue
        if not slow and _starts_slowly(backend):
            findings.setdefault("not tried (--engines does)", []).append(label)
            continue
        try:
            _check_backend(name, plan, device, dtype, backward=not refused[1])
            passes = "forward alone" if refused[1] else "forward and backward"
            right.setdefault(f"right {passes}", []).append(label)
        except Exception as error:  # whatever a driver or a compiler throws is a finding
            broken = True
            reason = f"FAILS: {' '.join(str(error).split())[:200]}"
            findings.setdefault(reason, []).append(label)
    told = [f"{', '.join(labels)} {finding}" for finding, labels in right.items()]
    told += [
        finding if len(labels) == len(dtypes) else f"{', '.join(labels)} {finding}"
        for finding, labels in findings.items()
    ]
    return bool(right) and not broken, "; ".join(told)


def _starts_slowly(backend) -> bool:
    from dittfast.kernels.capabilities import declares, variants_of

    return declares(backend) and any(one.slow_start for one in variants_of(backend))


def _small_plan():
    from dittfast.layout import Layout
    from dittfast.methods import METHODS

    return METHODS["local"](window=3, tile=(2, 4, 4)).plan(Layout.video(6, 7, 9, text=5))


def _check_backend(name: str, plan, device, dtype, backward: bool) -> None:
    import torch

    from dittfast.attention import attend
    from dittfast.testing import assert_within_budget, attention_inputs, eager_attention

    inputs = attention_inputs(1, 2, plan.num_queries, 64, dtype=dtype, device=device)
    mask = plan.to_dense_mask().to(device)
    results = []
    for backend, cast in ((name, dtype), ("eager", dtype), ("reference", torch.float64)):
        q, k, v, grad_out = (x.to(cast).requires_grad_(backward) for x in inputs)
        if backend == "eager":
            out = eager_attention(q, k, v, mask, 64**-0.5)
        else:
            out = attend(q, k, v, plan, backend=backend)
        grads = torch.autograd.grad(out, (q, k, v), grad_out.detach()) if backward else ()
        results.append((out, *grads))
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


def _print_capabilities() -> None:
    print("\nwhat backends take")
    for name, facts in capability_table():
        told = ((what, said) for what, said in facts.items() if said not in ("yes", "any", "all"))
        _row(name, "; ".join(f"{what}: {said}" for what, said in told))


def backends_markdown() -> str:
    """docs/backends.md: what each backend takes, from the data that refuses the rest."""
    from dittfast.attention import PREFERRED
    from dittfast.markdown import markdown_table

    preferred = "; ".join(
        f"on {device}: " + ", then ".join(f"`{name}`" for name in names)
        for device, names in PREFERRED.items()
    )
    facts = capability_table()
    rows = [[what, *(one[what] for _, one in facts)] for what in facts[0][1]]
    return f"""# Backends

Printed by `dittfast doctor --markdown docs/backends.md` from the data by which backends refuse
calls (`kernels/capabilities.py`). A backend that is named runs or raises, and the error names those
that can. PyTorch's own attention runs where a plan leaves nothing out; otherwise `backend="auto"`
takes the first that can, {preferred}.

{markdown_table(["", *(f"`{name}`" for name, _ in facts)], rows)}
{_notes()}"""


def _notes() -> str:
    """A line for each backend that is a module: the first of it."""
    from types import ModuleType

    from dittfast.attention import BACKENDS

    modules = ((name, load()) for name, load in BACKENDS.items())
    said = {
        name: module.__doc__.splitlines()[0]
        for name, module in modules
        if isinstance(module, ModuleType)
    }
    return "".join(f"- `{name}`: {line}\n" for name, line in said.items())


def capability_table() -> list[tuple[str, dict[str, str]]]:
    """Each set of capabilities of each backend, in words."""
    from dittfast.attention import BACKENDS
    from dittfast.kernels.capabilities import declares, described, variants_of

    variants = []
    for name, load in BACKENDS.items():
        backend = load()
        variants += [
            (name, described(x)) for x in (variants_of(backend) if declares(backend) else ())
        ]
    return variants


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
