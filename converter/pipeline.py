"""The conversion: check, then block by block read, quantize, write; then index, config and a final check."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.distributed import Processes
from bwla_converter.checkpoint.layout import Shards, output_config, quantized_head, verify
from bwla_converter.checkpoint.writer import CheckpointWriter, OutputError, check_output
from bwla_converter.common.devices import choose_device
from bwla_converter.listener import Listener
from bwla_converter.options import LinearReport, Options, Summary
from bwla_converter.planning.budget import Budget, check_budget, check_gpu, predict, usable_memory
from bwla_converter.planning.plan import ConversionPlan, input_bytes, make_plan, with_clips
from bwla_converter.recipes.base import Recipe, check_recipe, make_recipe
from bwla_converter.report.write import group_statistics, write_documents
from bwla_converter.resume.fingerprint import changed_file, code_version, machine, mark_files
from bwla_converter.resume.manifest import Inputs, LayerReport, WorkError, arguments_of
from bwla_converter.resume.work_folder import ACTIVATIONS, WorkFolder, check_work, open_work, work_path
from bwla_converter.source.model import Source, check_values, open_source
from bwla_kernels.format.schema import Provenance
from torch import Tensor


def convert(options: Options, listener: Listener | None = None, processes: Processes | None = None) -> Summary:
    """Convert a model; the output appears whole or not at all.

    Peak memory is one decoder block and the work space of its widest input group. Finished blocks are kept in the
    work folder OUT.work (`work`) until all is done, so that `Options.resume` can go on after any interruption.

    Raises:
        BWLAError: bad input or output, before any work where that can be known; nothing that existed is touched.
        KeyboardInterrupt: raised by the listener, or by a signal; what is finished can be resumed.
    """
    listener, processes = listener or Listener(), processes or Processes()
    check_recipe(options.recipe, options.calibration)
    device = choose_device(options.device)
    resuming = check_work(options.out, options.resume, options.restart)
    if not resuming:
        check_output(options.out, options.overwrite)
    source = open_source(options.model, options.ignore)
    if options.out.resolve() == source.folder.resolve():
        raise OutputError(
            f"{options.out}: is the model to convert, and would be replaced: choose another output"
        )
    settings = (options.rank, options.bits, options.clip)
    draft = make_plan(source, *settings, _provenance(options, source, {}), options.head_bits)
    listener.planned(source, draft)
    budget = _check_budget(options, source, draft, device)
    listener.budgeted(budget)
    on_disk = None if budget.hidden_in_memory else work_path(options.out) / ACTIVATIONS
    store = ActivationStore(on_disk, device, processes)
    recipe = make_recipe(options, source, store)
    provenance = _provenance(options, source, recipe.calibration)
    plan = make_plan(source, *settings, provenance, options.head_bits)
    inputs = Inputs(
        arguments=arguments_of(
            options,
            {
                "the model's name": provenance.base_model,
                "revision": provenance.revision,
                "--device": device.type,
                "--gpus": processes.world_size,
            },
        ),
        code=code_version(),
        machine=machine(device),
        calibration=json.loads(json.dumps(recipe.calibration)),
    )
    with open_work(options.out, inputs, options.restart) as work:
        if not work.is_published():
            check_output(options.out, options.overwrite)
            _check_source(work, source, plan, listener)
        summary = _finish(work, options, source, plan, recipe, listener, processes)
        if not work.is_published():
            check_output(options.out, options.overwrite)  # it may have come to be since
        work.publish()
    return summary


def follow(options: Options, processes: Processes) -> None:
    """The part in a conversion of a rank that is not the first: its windows, nothing that is written.

    Raises:
        BWLAError: as `convert`.
    """
    device = choose_device(options.device)
    source = open_source(options.model, options.ignore)
    settings = (options.rank, options.bits, options.clip)
    plan = make_plan(source, *settings, _provenance(options, source, {}), options.head_bits)
    recipe = make_recipe(options, source, ActivationStore(None, device, processes))
    restored, *done = processes.broadcast([False] * (source.num_layers + 1))
    if restored:
        recipe.restore({})
    for index in range(source.num_layers):
        if not done[index]:
            _quantize_layer(index, source, plan, recipe, Listener(), replace(options, report=False))
            recipe.state()


def _finish(
    work: WorkFolder,
    options: Options,
    source: Source,
    plan: ConversionPlan,
    recipe: Recipe,
    listener: Listener,
    processes: Processes,
) -> Summary:
    """Do what is left to do, up to a checked checkpoint that only has to be renamed."""
    published = work.is_published()
    if published or work.apply_replacements():
        work.adopt_all_shards()
        processes.broadcast([False, *[True] * source.num_layers])
        listener.resumed(source.num_layers, plan.weights, work.notes)
    else:
        _quantize_layers(work, source, plan, recipe, listener, options, processes)
        _write_rest(work.writer, source, plan)
        clips = {
            linear.name: linear.clip for record in work.records.values() for linear in record.report.linears
        }
        work.writer.finish(source.folder, output_config(source, with_clips(plan, clips)))
        work.replace(recipe.finish(work.writer.folder))
    reports = [work.records[index].report for index in range(source.num_layers)]
    summary = Summary(
        out=str(options.out),
        rank=plan.rank,
        fitting_rank=plan.fitting_rank,
        bits_per_weight=plan.bits_per_weight,
        weights=plan.weights,
        bytes_before=input_bytes(source),
        bytes_after=work.writer.total_size,
        seconds=round(work.seconds, 1),
        layers=[linear for report in reports for linear in report.linears],
    )
    if not published:
        verify(work.writer.folder)
        traces = [report.traces for report in reports]
        statistics = [report.statistics for report in reports]
        write_documents(work.writer.folder, source, options, summary, traces, statistics)
    return summary


def _check_budget(options: Options, source: Source, plan: ConversionPlan, device: torch.device) -> Budget:
    """Refuse what does not fit; what an interrupted conversion left counts as free."""
    limit = options.max_memory or usable_memory()
    budget = predict(source, plan, options.recipe, options.calibration, limit, device=device.type)
    check_gpu(budget, device)
    left = work_path(options.out).rglob("*")
    free = shutil.disk_usage(options.out.absolute().parent).free
    check_budget(budget, limit, options.out, free + sum(path.stat().st_size for path in left))
    return budget


def _check_source(work: WorkFolder, source: Source, plan: ConversionPlan, listener: Listener) -> None:
    """Refuse a model that holds NaN, or one that is not the one that the work was begun with."""
    if work.manifest.source:
        _refuse_changed(work, source)
    else:
        check_values(source, plan.head_source, listener.checked)
        work.save(source=mark_files(source))
    listener.quantizing()


def _refuse_changed(work: WorkFolder, source: Source) -> None:
    file = changed_file(source, work.manifest.source)
    if file is not None:
        raise WorkError(
            f"{source.folder / file}: has changed since {work.path} was started: put the old file back, or add "
            "--restart to discard the unfinished conversion"
        )


def _quantize_layers(
    work: WorkFolder,
    source: Source,
    plan: ConversionPlan,
    recipe: Recipe,
    listener: Listener,
    options: Options,
    processes: Processes,
) -> None:
    """All blocks that are not finished yet, each committed as soon as it is."""
    work.discard_damaged_layers()
    shards, done = Shards(source), work.records
    for record in done.values():
        work.writer.adopt_shard(record.shard.file, record.shard.sha256)
    restored = bool(done) and bool(done[max(done)].state)
    processes.broadcast([restored, *(index in done for index in range(source.num_layers))])
    if restored:
        recipe.restore(work.load_state(max(done)))
    weights = sum(linear.weights for record in done.values() for linear in record.report.linears)
    if done or work.notes:
        listener.resumed(len(done), weights, work.notes)
    for index in range(source.num_layers):
        if index in done:
            continue
        listener.layer_started(index)
        tensors, report = _quantize_layer(index, source, plan, recipe, listener, options)
        work.writer.write_shard(shards.layer_file(index), tensors)
        del tensors
        _refuse_changed(work, source)
        work.commit_layer(index, shards.layer_file(index), recipe.state(), report)
        listener.layer_done(index)


def _quantize_layer(
    index: int, source: Source, plan: ConversionPlan, recipe: Recipe, listener: Listener, options: Options
) -> tuple[dict[str, Tensor], LayerReport]:
    """Tensors of a block's shard, and what the report says of it."""
    device = choose_device(options.device)
    block = source.read(source.names_of_layer(index))
    tensors, linears, traces = dict(block), [], {}
    statistics: dict[str, dict[str, Any]] = {}
    recipe.begin_layer(index, block)
    for _, names in source.groups_of_layer(index):
        weights = {name: tensors.pop(f"{name}.weight").to(device) for name in names}
        result = recipe.quantize(weights, {name: plan.specs[name] for name in names})
        for name in names:
            tensors.update({f"{name}.{key}": value for key, value in result.tensors[name].items()})
            clip = plan.specs[name].clip if result.clip is None else result.clip
            linears.append(LinearReport(name, block[f"{name}.weight"].numel(), result.errors[name], clip))
            listener.quantized(linears[-1])
        traces[names[0]] = result.traces
        for kind, table in group_statistics(weights, result).items() if options.report else ():
            statistics.setdefault(kind, {}).update(table)
    tensors.update(recipe.end_layer())
    traces.update(recipe.layer_traces)
    return tensors, LayerReport(linears=linears, traces=traces, statistics=statistics)


def _write_rest(writer: CheckpointWriter, source: Source, plan: ConversionPlan) -> None:
    """What belongs to no block: as it is, but for the head."""
    for file, names in Shards(source).rest():
        tensors = source.read([name for name in names if not plan.is_replaced(name)])
        if plan.head_source in names:
            tensors.update(quantized_head(source.read([plan.head_source])[plan.head_source]))
        writer.write_shard(file, tensors)


def _provenance(options: Options, source: Source, calibration: dict[str, object]) -> Provenance:
    return Provenance(
        base_model=options.model if source.revision else source.folder.resolve().name,
        revision=source.revision,
        recipe=options.recipe,
        seed=options.seed,
        bwla_version=version("bwla"),
        calibration=calibration,
    )
