"""The conversion: check everything, then read, quantize and write one decoder layer at a time; finish and verify."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bwla_converter.allocation.stage import check_targets
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.distributed import Processes
from bwla_converter.checkpoint.layout import Parts, output_config, verify
from bwla_converter.checkpoint.writer import (
    OutputError,
    check_name,
    check_output,
    existing_parent,
    parents_created,
    write_errors_explained,
)
from bwla_converter.common.bits import num_weights
from bwla_converter.common.devices import choose_device
from bwla_converter.common.threads import choose_threads, use_threads
from bwla_converter.conversion import (
    Conversion,
    allocated,
    losses,
    lossless_note,
    starved_note,
    with_amounts,
    with_calibration,
    with_written_text,
)
from bwla_converter.listener import Listener
from bwla_converter.options import LinearReport, Options, Summary
from bwla_converter.outside_layers import write_rest
from bwla_converter.planning.budget import Budget, check_budget, check_gpu, predict, usable_memory
from bwla_converter.planning.choose import choose_recipe, plan_conversion
from bwla_converter.planning.plan import ConversionPlan, input_bytes, with_clips
from bwla_converter.recipes.base import Recipe, check_recipe, make_recipe
from bwla_converter.report.write import group_statistics, write_documents
from bwla_converter.resume.fingerprint import changed_file, code_version, machine, mark_files
from bwla_converter.resume.manifest import Inputs, LayerReport, WorkError, arguments_of
from bwla_converter.resume.work_folder import ACTIVATIONS, WorkFolder, check_work, open_work, work_path
from bwla_converter.source.model import Source, check_values, open_source
from bwla_kernels.format.experts import stores
from torch import Tensor

TO_CONTINUE = "then add --resume to the same command to continue"

RecipeFactory = Callable[[Options, Source, ActivationStore], Recipe]


def convert(
    options: Options,
    listener: Listener | None = None,
    *,
    processes: Processes | None = None,
    recipe_factory: RecipeFactory | None = None,
) -> Summary:
    """Convert a model into a BWLA checkpoint. The output folder appears complete or not at all.

    Peak memory is about one decoder layer plus the work space of its widest input group. Finished layers are kept in
    the work folder `OUT.work` until the checkpoint is complete, so that `Options.resume` can continue after any
    interruption. Everything that can be checked without reading weights is checked first.

    Args:
        options: what to convert, and how.
        listener: receives the progress; None for nobody.
        processes: the processes that share the calibration samples, of which this is the first; None for this one
            alone.
        recipe_factory: makes the recipe; None for `recipes.base.make_recipe`, which makes the one that
            `options.recipe` names.

    Returns:
        Sizes, rank and errors of the result.

    Raises:
        BWLAError: the options, the model, the calibration text or the output folder cannot be used, or memory or disk
            space is too small. Existing files are left as they are.
        KeyboardInterrupt: raised by the listener or by a signal; finished layers can be resumed from.
    """
    listener, processes = listener or Listener(), processes or Processes()
    options = with_calibration(options)
    check_targets(options)
    planes = 2 if options.allocates else options.planes
    check_recipe(options.recipe, options.calibration, planes, options.head_bits)
    device = choose_device(options.device)
    check_name(options.out)
    if not check_work(options.out, options.resume, options.restart):
        check_output(options.out, options.overwrite)
    source = open_source(options.model, options.ignore, listener.dequantized)
    if options.out.resolve() == source.folder.resolve():
        raise OutputError(
            f"{options.out}: the output folder is the model to convert: choose another output folder"
        )
    options, weights = choose_recipe(options, source)
    options = with_amounts(options, source, device)
    plan = plan_conversion(options, source, weights)
    listener.planned(source, plan)
    with use_threads(_threads(options, plan)):
        recipe_of = recipe_factory or make_recipe
        return _convert(options, source, plan, recipe_of, device, listener, processes)


def _convert(
    options: Options,
    source: Source,
    plan: ConversionPlan,
    recipe_factory: RecipeFactory,
    device: torch.device,
    listener: Listener,
    processes: Processes,
) -> Summary:
    """Convert a model whose structure has been checked; arguments as in `convert`."""
    budget = _check_budget(options, source, plan, device)
    listener.budgeted(budget)
    on_disk = None if budget.hidden_in_memory else work_path(options.out) / ACTIVATIONS
    store = ActivationStore(on_disk, device, processes)
    options = with_written_text(options, source, device, listener)
    recipe = recipe_factory(options, source, store)
    plan = _with_calibration(plan, recipe.calibration)
    conversion = Conversion(options, source, plan, recipe, listener, store)
    with (
        write_errors_explained(options.out, budget.disk, TO_CONTINUE),
        parents_created(options.out),
        open_work(options.out, _inputs(conversion), options.restart) as work,
    ):
        if not work.is_published():
            check_output(options.out, options.overwrite)
            _check_source(conversion, work)
        summary = _complete(allocated(conversion, work), work)
        if not work.is_published():
            check_output(options.out, options.overwrite)  # it may have been created in the meantime
        work.publish()
    return summary


def follow(options: Options, processes: Processes) -> None:
    """Run the worker loop of processes other than the first: their share of the samples; they write nothing.

    Raises:
        BWLAError: as in `convert`.
    """
    options, device = replace(with_calibration(options), report=False), choose_device(options.device)
    source = open_source(options.model, options.ignore)
    options, weights = choose_recipe(options, source)
    options = with_amounts(options, source, device)
    plan = plan_conversion(options, source, weights)
    with use_threads(_threads(options, plan)):
        _follow(options, source, plan, device, processes)


def _follow(
    options: Options, source: Source, plan: ConversionPlan, device: torch.device, processes: Processes
) -> None:
    store = ActivationStore(None, device, processes)
    options = with_written_text(options, source, device, Listener())
    recipe = make_recipe(options, source, store)
    conversion = allocated(Conversion(options, source, plan, recipe, Listener(), store), None)
    restored, *done = processes.broadcast_flags([False] * (source.num_layers + 1))
    if restored:
        recipe.restore({})
    for index in range(source.num_layers):
        if not done[index]:
            _quantize_layer(conversion, index)
            recipe.state()


def _threads(options: Options, plan: ConversionPlan) -> int:
    """Return the number of threads of a conversion."""
    return choose_threads(options.threads, max(map(num_weights, plan.specs.values()), default=0))


def _with_calibration(plan: ConversionPlan, calibration: Mapping[str, object]) -> ConversionPlan:
    """Return the plan with the recipe's description of its calibration text in the provenance."""
    provenance = plan.format.provenance.model_copy(update={"calibration": dict(calibration)})
    return replace(plan, format=plan.format.model_copy(update={"provenance": provenance}))


def _inputs(conversion: Conversion) -> Inputs:
    """Return everything that determines the bytes of the result."""
    provenance = conversion.plan.format.provenance
    others = {
        "the model's name": provenance.base_model,
        "revision": provenance.revision,
        "--device": conversion.device.type,
        "--gpus": conversion.processes.world_size,
    }
    return Inputs(
        arguments=arguments_of(conversion.options, others),
        code=code_version(),
        machine=machine(conversion.device),
        calibration=json.loads(json.dumps(provenance.calibration)),
    )


def _complete(conversion: Conversion, work: WorkFolder) -> Summary:
    """Do everything that is left until the checkpoint is verified and only has to be renamed."""
    source, plan = conversion.source, conversion.plan
    published = work.is_published()
    if published or work.apply_replacements():
        work.adopt_all_shards()
        conversion.processes.broadcast_flags([False, *[True] * source.num_layers])
        conversion.listener.resumed(source.num_layers, plan.weights, work.notes)
    else:
        _quantize_layers(conversion, work)
        clips = {
            linear.name: linear.clip for record in work.records.values() for linear in record.report.linears
        }
        clips |= write_rest(work.writer, conversion)
        work.writer.finish(source.folder, output_config(source, with_clips(plan, clips), work.writer.entries))
        work.replace(conversion.recipe.finish(work.writer.folder))
    work.merge()
    reports = [work.records[index].report for index in range(source.num_layers)]
    summary = Summary(
        out=str(conversion.options.out),
        rank=plan.rank,
        fitting_rank=plan.fitting_rank,
        bits_per_weight=plan.bits_per_weight,
        weights=plan.weights,
        bytes_before=input_bytes(source),
        bytes_after=work.writer.total_size,
        seconds=round(work.seconds, 1),
        linears=[linear for report in reports for linear in report.linears],
        activation_bits=plan.format.bits,
        planes=plan.weights_by_planes,
        notes=[*source.notes, *lossless_note(conversion), *starved_note(reports)],
        **losses(conversion, work.writer.folder),
    )
    if not published:
        verify(work.writer.folder)
        traces = [report.traces for report in reports]
        statistics = [report.statistics for report in reports]
        write_documents(work.writer.folder, source, conversion.options, summary, traces, statistics)
    return summary


def _check_budget(options: Options, source: Source, plan: ConversionPlan, device: torch.device) -> Budget:
    """Predict memory and disk space, and raise if there is too little of either."""
    limit = options.max_memory or usable_memory()
    budget = predict(
        source,
        plan,
        options.recipe,
        options.calibration,
        limit,
        device=device.type,
        epochs=(options.tune_epochs, options.distill_epochs),
    )
    check_gpu(budget, device)
    free = shutil.disk_usage(existing_parent(options.out)).free
    check_budget(budget, limit, options.out, free + disk_bytes(work_path(options.out)))
    return budget


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below `folder`, which removing it would free; 0 if it does not exist.

    A file with several hard links counts once: after a kill, the saved states and the activations share their files.
    """
    stats = (path.lstat() for path in folder.rglob("*") if not path.is_dir())
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def _check_source(conversion: Conversion, work: WorkFolder) -> None:
    """Raise if the model holds NaN or infinity, or differs from the one that the work folder was started with."""
    if work.manifest.source:
        _check_unchanged(conversion, work)
    else:
        vocabulary = conversion.plan.vocabulary_sources
        check_values(conversion.source, vocabulary, conversion.listener.checked)
        work.save(source=mark_files(conversion.source))
    conversion.listener.quantizing()


def _check_unchanged(conversion: Conversion, work: WorkFolder) -> None:
    file = changed_file(conversion.source, work.manifest.source)
    if file is not None:
        raise WorkError(
            f"{conversion.source.folder / file}: has changed since {work.path} was started: put the old file back, "
            "or add --restart to discard the unfinished conversion"
        )


def _quantize_layers(conversion: Conversion, work: WorkFolder) -> None:
    """Quantize every decoder layer that is not finished yet, and commit each one."""
    source, recipe, listener = conversion.source, conversion.recipe, conversion.listener
    work.discard_damaged_layers()
    parts, done = Parts(source), work.records
    for record in done.values():
        work.writer.adopt_shard(record.shard.file, record.shard.sha256)
    restored = bool(done) and bool(done[max(done)].state)
    conversion.processes.broadcast_flags([restored, *(index in done for index in range(source.num_layers))])
    if restored:
        recipe.restore(work.load_state(max(done)))
    weights = sum(linear.weights for record in done.values() for linear in record.report.linears)
    if done or work.notes:
        listener.resumed(len(done), weights, work.notes)
    for index in range(source.num_layers):
        if index in done:
            continue
        listener.layer_started(index)
        tensors, report = _quantize_layer(conversion, index)
        work.writer.write_shard(parts.layer_file(index), tensors)
        del tensors
        _check_unchanged(conversion, work)
        work.commit_layer(index, parts.layer_file(index), recipe.state(), report)
        listener.layer_done(index)


def _quantize_layer(conversion: Conversion, index: int) -> tuple[dict[str, Tensor], LayerReport]:
    """Return the tensors of a decoder layer's part, and what is reported about the layer."""
    source, plan, recipe = conversion.source, conversion.plan, conversion.recipe
    stored = source.read(source.names_of_layer(index))
    tensors, linears, traces = dict(stored), [], {}
    statistics: dict[str, dict[str, Any]] = {}
    starved: list[str] = []
    recipe.begin_layer(index, stored)
    for _, names in source.groups_of_layer(index):
        weights = {name: tensors.pop(f"{name}.weight").to(conversion.device) for name in names}
        result = recipe.quantize(weights, {name: plan.specs[name] for name in names})
        for name in names:
            tensors.update(
                {f"{name}.{key}": value for key, value in result.tensors[name].items() if stores(name, key)}
            )
            clip = plan.specs[name].clip if result.clip is None else result.clip
            linears.append(LinearReport(name, stored[f"{name}.weight"].numel(), result.errors[name], clip))
            conversion.listener.linear_quantized(linears[-1])
        traces[names[0]] = result.traces
        starved += result.starved
        if conversion.options.report:
            for kind, table in group_statistics(weights, result).items():
                statistics.setdefault(kind, {}).update(table)
    tensors.update(recipe.end_layer())
    traces.update(recipe.layer_traces)
    return tensors, LayerReport(linears=linears, traces=traces, statistics=statistics, starved=starved)
