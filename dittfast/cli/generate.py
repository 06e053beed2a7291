"""``dittfast generate``: draw a picture with a pipeline, dense and sparse."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from dittfast.files import (
    atomic_path,
    check_ffmpeg,
    check_fps,
    check_output,
    gif_milliseconds,
    save_video,
    write_json,
)

from .adapter import add_adapter_argument, chosen_adapter
from .options import (
    CALL,
    add_call_arguments,
    add_guidance_arguments,
    add_json_argument,
    add_method_arguments,
    add_model_argument,
    add_pipeline_arguments,
    add_place_arguments,
    add_position_scale,
    check_json,
    check_loading_options,
    files_read,
    fitted_scale,
    guidance,
    load_pipeline,
    loading,
    method_and_schedule,
    on_stage,
    preset_of,
    seconds,
    write_json_result,
)
from .values import anything, number, seed, sizes, whole

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".gif")
EXAMPLE = """\
examples:
  dittfast generate "a panda on a green background" -o panda.png
  dittfast generate "a panda on a green background" -m local/sample-flux --compare -o panda.png
  dittfast generate "a fox, blue background" --stages 256,1024 --method local --compare -o fox.png
  dittfast generate "a car moves right on a green background" --model sample-video -o car.mp4
  dittfast generate --examples
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast generate``."""
    parser.epilog = EXAMPLE
    parser.add_argument("prompt", nargs="?", type=anything, help="what to draw")
    parser.add_argument(
        "--examples", action="store_true", help="list prompts the sample model was trained for"
    )
    add_model_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"what to write: {', '.join(IMAGES)}, for a video {' or '.join(VIDEOS)}; a record of "
        "the run goes beside it as .json. Existing files are replaced",
    )
    parser.add_argument(
        "--numbered",
        action="store_true",
        help="write the frames of a video as pictures: clip.png becomes clip.000.png and so on",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="the picture that an image-to-video pipeline starts from; a sample video model draws "
        "one from the prompt where none is given",
    )
    add_method_arguments(parser, "; dense attention without it", for_model=True)
    add_adapter_argument(parser)
    _add_comparing(parser)
    _add_large(parser)
    add_guidance_arguments(parser)
    call = add_call_arguments(parser)
    call.add_argument("--seed", type=seed, default=0, metavar="N", help="(default: 0)")
    call.add_argument("--fps", type=whole(), metavar="N", help="of a video (default: 16)")
    add_pipeline_arguments(parser)
    add_place_arguments(parser)
    add_json_argument(parser)
    parser.set_defaults(says=("dittfast.pipelines.runs.needs", "dittfast.pipelines.runs.run"))


def _add_comparing(parser: argparse.ArgumentParser) -> None:
    comparing = parser.add_argument_group("comparing")
    comparing.add_argument(
        "--compare",
        action="store_true",
        help="draw with dense attention too: dense | method | difference in one picture; with "
        "--stages the last of them",
    )
    comparing.add_argument(
        "--runs", type=whole(), default=1, metavar="N", help="timed runs of each (default: 1)"
    )
    comparing.add_argument(
        "--save-all", action="store_true", help="write the compared pictures on their own too"
    )


def _add_large(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_argument_group("large pictures, drawn in stages (SDEdit)")
    stages.add_argument(
        "--stages",
        type=sizes,
        metavar="N,...",
        help="sizes to draw one after the other, such as 1024,2048: sides of a square, or "
        "HEIGHTxWIDTH; --method works in those after the first",
    )
    stages.add_argument(
        "--strength",
        type=number(above=0, most=1),
        metavar="X",
        help="noise before each further stage (0.7; a sample model has its own)",
    )
    stages.add_argument(
        "--ntk-factor",
        type=number(above=0),
        metavar="X",
        help="of FLUX's rotary base there (10; a sample model has its own)",
    )
    add_position_scale(parser)
    parser.add_argument(
        "--position-until",
        type=number(least=0, below=1),
        metavar="T",
        help="scale them while the time is above T, from 1, pure noise, down to 0 (default: 0)",
    )


def run(args) -> int:
    """Check all that can be checked, load, draw, and only then write."""
    from dittfast.pipelines.runs import sources

    if args.examples:
        return _list_examples(sources.find(args.model))
    output, given = _checked(args)
    source = sources.find(args.model)
    adapter, guided, stages = chosen_adapter(args), guidance(args), _stages(args)
    method, schedule = adapter, None
    if adapter is None:
        method, schedule = method_and_schedule(args, source)
    if args.compare and method is None:
        raise ValueError("--compare needs a method; add --method local, or --config FILE")
    if stages and adapter is not None:
        raise ValueError("--adapter does not go with --stages; leave out one of them")
    check_loading_options(args, source)
    _check_outline(args, source, given, stages, None if adapter else method, schedule, guided)
    pipe = load_pipeline(args, source, [] if args.method is None else [args.method])

    from dittfast.pipelines.runs.call import call_arguments
    from dittfast.pipelines.runs.compare import generate, record
    from dittfast.pipelines.runs.first_frame import with_first_frame

    call = call_arguments(pipe, args.prompt, source.settings, **given)
    _check_kind(args, pipe, call, source)
    call = with_first_frame(pipe, call, source.settings)
    asked = {"preset": preset_of(args), "loading": loading(args).to_dict()}
    if stages:
        attention = {"method": method, "schedule": schedule, "backend": args.backend}
        done = _draw_stages(args, pipe, source, call, stages, guided, attention)
        return _write_stages(args, pipe, source, call, done, guided, output, asked)
    positions = {
        "position_scale": fitted_scale(args, source, call),
        "position_until": args.position_until or 0.0,
    }
    arms = generate(
        pipe,
        call,
        method,
        schedule,
        guidance=guided,
        **positions,
        backend=args.backend,
        seed=args.seed,
        compare=args.compare,
        runs=args.runs,
        on_stage=on_stage(pipe),
    )
    data = record(pipe, source, call, args.seed, arms, guided, **positions) | asked
    data |= {"adapter": args.adapter} | ({"image": args.image} if args.image else {})
    written = _write(output, _parts(output, arms, data, args), data, args.fps)
    for line in _summary(arms, data):
        print(line)
    if output.suffix.lower() == ".gif" and 100 % args.fps:
        print(_gif_words(len(arms[0].run.frames), args.fps))
    print("wrote " + ", ".join(map(str, written)))
    write_json_result(args, data)
    return 0


def _checked(args) -> tuple[Path, dict]:
    """The output file, and the arguments of the call that were given; checked without a model."""
    if args.prompt is None:
        raise ValueError('the prompt is missing; try: dittfast generate "a red apple" -o apple.png')
    if args.output is None:
        raise ValueError("-o FILE is missing; say where the picture should go")
    output = check_output(args.output, IMAGES + VIDEOS)
    record = check_output(output.with_suffix(".json"))
    check_json(args, {"-o": output, "the record beside -o": record}, files_read(args))
    if args.save_all and not (args.compare or args.stages):
        raise ValueError("--save-all writes the parts of a comparison; add --compare, or --stages")
    moving = output.suffix.lower() in VIDEOS
    if args.numbered and moving:
        raise ValueError(f"--numbered writes pictures, and {output} is a video; name it .png")
    if args.fps is not None and not moving:
        raise ValueError(f"--fps {args.fps} is for a video, and {output} is none; leave it out")
    args.fps = args.fps or 16
    if output.suffix.lower() == ".mp4":
        check_ffmpeg(output)
    if args.position_until is not None and args.position_scale is None:
        raise ValueError(
            f"--position-until {args.position_until:g} ends what --position-scale does, and that "
            "is not given; add --position-scale 0.5, or fit"
        )
    given = {name: getattr(args, name) for name in CALL}

    from dittfast.pictures import read_picture
    from dittfast.pipelines.runs.call import check_ranges

    check_ranges(prompt=args.prompt, seed=args.seed, runs=args.runs, fps=args.fps, **given)
    check_fps(output, args.fps)
    if args.image is not None:
        given["image"] = read_picture(args.image)
    return output, given


def _check_outline(args, source, given: dict, stages, method, schedule, guided) -> None:
    """Check, before weights are read, all that the model's folder tells."""
    from dittfast.pipelines.runs.high_resolution import rope_theta_scaled
    from dittfast.pipelines.runs.outline import check_run, outline
    from dittfast.pipelines.runs.positions import positions_scaled

    pipe = outline(source)
    if pipe is None:
        return
    for height, width in stages or [(args.height, args.width)]:
        size = {"height": height, "width": width}
        call = check_run(pipe, source, args.prompt, given | size, method, schedule, guided)
        _check_kind(args, pipe, call, source)
        scale = 1.0 if stages and args.position_scale == "fit" else fitted_scale(args, source, call)
        with (
            positions_scaled(pipe, scale, args.position_until or 0.0),
            rope_theta_scaled(pipe, args.ntk_factor or 1),
        ):
            pass  # checks them


def _check_kind(args, pipe, call: dict, source) -> None:
    """Whether the file can hold what the model draws: a picture, or a video.

    Raises:
        ValueError: it cannot.
    """
    from dittfast.pipelines.runs.call import is_video

    path = Path(args.output)
    moving = path.suffix.lower() in VIDEOS
    if not is_video(pipe) or call.get("num_frames") == 1:
        if moving or args.numbered:
            what = f"{path} is a video" if moving else "--numbered is for videos"
            raise ValueError(
                f"{what}, and {source.name} draws one picture; name it {', '.join(IMAGES)}"
                + ("" if moving else " and leave out --numbered")
            )
    elif args.stages:
        raise ValueError(f"{source.name} draws videos; --stages is for pictures, leave it out")
    elif not (moving or args.numbered):
        raise ValueError(
            f"{path} is a picture, and {source.name} draws a video; name it "
            f"{' or '.join(VIDEOS)}, or add --numbered for a picture of every frame"
        )


def _stages(args) -> list[tuple[int, int]] | None:
    """The sizes that ``--stages`` names.

    Raises:
        ValueError: no sizes, or options that do not go together.
    """
    if args.stages is None:
        for name in ("strength", "ntk_factor"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for --stages; add --stages")
        return None
    for name in ("height", "width", "num_frames"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --stages")

    from dittfast.pipelines.runs.call import check_ranges
    from dittfast.pipelines.runs.high_resolution import check_stages

    check_stages(args.stages)
    for height, width in args.stages:
        check_ranges(prompt=args.prompt, height=height, width=width)
    return args.stages


def _draw_stages(args, pipe, source, call, stages, guided, attention: dict):
    from dittfast.pipelines.runs.high_resolution import generate_high_resolution

    names = ("strength", "ntk_factor", "position_scale", "position_until")
    given = {name: getattr(args, name) for name in names}
    return generate_high_resolution(
        pipe,
        args.prompt,
        stages,
        call={k: v for k, v in call.items() if k not in ("prompt", "height", "width")},
        guidance=guided,
        seed=args.seed,
        on_stage=on_stage(pipe),
        compare=args.compare,
        runs=args.runs,
        **attention,
        **source.settings.get("stages", {})
        | {name: value for name, value in given.items() if value is not None}
        | {"later_call": _later_call(args, source)},
    )


def _later_call(args, source) -> dict:
    """What a sample model's stages after the first are called with, where nobody says otherwise."""
    own = source.settings.get("stages", {}).get("later_call", {})
    return {name: value for name, value in own.items() if getattr(args, name) is None}


def _write_stages(args, pipe, source, call, done, guided, output: Path, asked: dict) -> int:
    from dittfast.pipelines.runs.compare import describe_run, record
    from dittfast.pipelines.runs.high_resolution import as_record

    last = done[-1]
    if last.arms:
        positions = {"position_scale": last.position_scale, "position_until": last.position_until}
        data = record(pipe, source, call, args.seed, last.arms, guided, **positions) | asked
        parts = _parts(output, last.arms, data, args)
    else:
        data = describe_run(pipe, source, call, args.seed, guided) | asked
        parts = {output: last.run.frames}
    data |= {"stages": as_record(done), "later_call": _later_call(args, source)}
    if args.save_all:
        for number, stage in enumerate(done[:-1], 1):
            parts[output.with_name(f"{output.stem}.stage-{number}{output.suffix}")] = (
                stage.run.frames
            )
    written = _write(output, parts, data, args.fps)
    for stage in done:
        width, height = stage.image.size
        kept, ran = "dense", stage.description
        if ran is not None and ran.did_not_run is not None:
            kept = f"{ran.method.name} DID NOT RUN ({ran.did_not_run})"
        elif ran is not None:
            kept = f"{ran.method.name}, {ran.amount}"
        took = seconds(stage.run.timing.total)
        print(f"{width} x {height}: {stage.num_tokens:,} tokens, {kept}, {took}")
    for line in _summary(last.arms, data) if last.arms else ():
        print(line)
    if asked["preset"] is not None:
        print(f"preset    {asked['preset']}")
    print("wrote " + ", ".join(map(str, written)))
    write_json_result(args, data)
    return 0


def _list_examples(source) -> int:
    prompts = source.settings.get("prompts")
    if not prompts:
        raise ValueError(f"{source.name} is no sample model, so it has no list of prompts")
    print("\n".join(prompts))
    for name in ("labels", "backgrounds", "motions"):
        if name in source.settings:
            print(f"\n{name} it was trained on: {', '.join(source.settings[name])}")
    return 0


def _frames(arms, data):
    """What goes into the main file: the picture, or dense | method | difference, for each frame."""
    if len(arms) == 1:
        return arms[0].run.frames
    import numpy as np
    from PIL import Image

    from dittfast.measure.draw import Panel, compare, difference

    dense, sparse = arms
    apart, gain = difference(dense.run.frames, sparse.run.frames)
    captions = _captions(arms, data, gain)
    title = f'"{data["prompt"]}"'
    height, width = dense.run.frames.shape[1:3]
    footer = (
        f"{data['model']}, {width} x {height}, {len(dense.timings[0].steps)} steps, "
        f"seed {data['seed']}, {data['device']['name']}, {data['dtype']}, "
        f"dense by {data['dense_attention']} attention"
        + (f", {sparse.name} by preset {data['preset']}" if data["preset"] else "")
    )
    pages = []
    for frames in zip(dense.run.frames, sparse.run.frames, apart):
        panels = [Panel(Image.fromarray(f), *caption) for f, caption in zip(frames, captions)]
        pages.append(np.asarray(compare(panels, title, footer)))
    return np.stack(pages)


def _captions(arms, data, gain: int):
    """Name and lines below each picture of a comparison."""
    dense, sparse = arms
    if sparse.did_not_run is not None:
        return (
            (dense.name, (_times(dense),)),
            (f"{sparse.name} DID NOT RUN", (f"dense attention drew this: {sparse.did_not_run}",)),
            (f"|{dense.name} - {sparse.name}| x {gain}", (_distance(data["against_dense"]),)),
        )
    ratio = data["dense_over_sparse"]["per_step"] or data["dense_over_sparse"]["whole"]
    facts = [f"{ratio:.2f}x as fast"]
    facts.insert(0, str(sparse.amount))
    schedule = sparse.description.schedule
    dense_steps = schedule.dense_first_steps + schedule.dense_last_steps
    if dense_steps:
        facts.insert(1, f"{dense_steps} steps dense")
    return (
        (dense.name, (_times(dense),)),
        (f"{sparse.name} {_options(sparse)}", (_times(sparse), ", ".join(facts))),
        (f"|{dense.name} - {sparse.name}| x {gain}", (_distance(data["against_dense"]),)),
    )


def _options(arm) -> str:
    """The method's first option, and those that are not at their default."""
    from dataclasses import fields

    method = arm.description.method
    if method.parts:
        return method.words()
    shown = [
        f"{field.name}={getattr(method, field.name)}"
        for number, field in enumerate(fields(method))
        if number == 0 or getattr(method, field.name) != field.default
    ]
    return ", ".join(shown)


def _times(arm) -> str:
    text = f"{seconds(arm.seconds)} in all"
    if arm.seconds_per_step is not None:
        text = f"{seconds(arm.seconds_per_step)} a step, {text}"
    return text


def _distance(quality: dict) -> str:
    if quality["identical"]:
        return "identical pictures"
    text = f"PSNR {quality['psnr_db']:.2f} dB"
    return text if quality["ssim"] is None else f"{text}, SSIM {quality['ssim']:.4f}"


def _parts(output: Path, arms, data: dict, args) -> dict:
    """File name -> frames: the picture, and with ``--save-all`` each part of a comparison."""
    parts = {output: _frames(arms, data)}
    if args.save_all and len(arms) > 1:
        from dittfast.measure.draw import difference

        dense, sparse = (arm.run.frames for arm in arms)
        names = (arms[0].name, arms[1].name, "difference")
        for name, frames in zip(names, (dense, sparse, difference(dense, sparse)[0])):
            parts[output.with_name(f"{output.stem}.{name}{output.suffix}")] = frames
    return parts


def _write(output: Path, parts: dict, data: dict, fps: int) -> list[Path]:
    """Write the pictures and their record; all of them or none."""
    parts = {path: x for each in parts.items() for path, x in _numbered(*each)}
    beside = output.with_suffix(".json")
    with ExitStack() as stack:
        for path, frames in parts.items():
            _save(stack.enter_context(atomic_path(path)), frames, fps)
        write_json(beside, data | {"files": [path.name for path in parts]})
    return [*parts, beside]


def _gif_words(count: int, fps: int) -> str:
    """How long a GIF shows its frames, where that is not 1 / fps."""
    times = sorted({t // 10 for t in gif_milliseconds(count, fps)})
    each = " or ".join(map(str, times))
    return f"a GIF counts hundredths of a second: its frames are shown for {each} at {fps} fps"


def _numbered(path: Path, frames):
    """A video as frames, ``clip.000.png`` and so on, where the file name is that of an image."""
    if len(frames) == 1 or path.suffix.lower() in VIDEOS:
        return [(path, frames)]
    digits = max(3, len(str(len(frames) - 1)))
    numbers = range(len(frames))
    return [
        (path.with_name(f"{path.stem}.{n:0{digits}}{path.suffix}"), frames[n : n + 1])
        for n in numbers
    ]


def _save(path: Path, frames, fps: int) -> None:
    if path.suffix.lower() in VIDEOS:
        save_video(path, frames, fps)
        return
    from PIL import Image

    Image.fromarray(frames[0]).save(path)


def _summary(arms, data: dict) -> list[str]:
    last = arms[-1]
    lines = [f"preset    {data['preset']}"] if data["preset"] else []
    lines += [] if last.description is None else str(last.description).splitlines()
    lines += [f"{arm.name:<10}{_times(arm)}" for arm in arms]
    if len(arms) > 1:
        ratio = data["dense_over_sparse"]
        if last.did_not_run is not None:
            lines.append(f"speed     no ratio: {last.name} DID NOT RUN ({last.did_not_run})")
            return [*lines, f"picture   {_distance(data['against_dense'])} to dense"]
        step = "" if ratio["per_step"] is None else f"{ratio['per_step']:.2f}x a step, "
        lines.append(f"speed     {step}{ratio['whole']:.2f}x in all, against dense")
        lines.append(f"picture   {_distance(data['against_dense'])} against dense")
    return lines
