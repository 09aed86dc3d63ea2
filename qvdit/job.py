"""The main job: a trained video DiT in, a proven quantized bundle out, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import qvdit.runtimes
from qvdit.contract import Bits, QvditError, checkpoint
from qvdit.contract.bundle import (
    EDGE,
    KEPT_WEIGHTS,
    MANIFEST,
    ORT_MODEL,
    PARITY_HALF,
    PARITY_INPUTS,
    PARITY_REFERENCE,
    PRECISIONS,
    QDQ_MODEL,
    TENSORRT_INT4_MODEL,
    TENSORRT_LAYERS,
    TENSORRT_MODEL,
    Manifest,
    read_manifest,
    write_manifest,
)
from qvdit.contract.files import read_json, sha256, write_json
from qvdit.contract.kernels import unserved_shape
from qvdit.contract.layer import Layer, WeightSize, group_size, rotation_block
from qvdit.contract.video import described
from qvdit.method import calibration, quantization, statistics
from qvdit.method.calibration import Progress, no_progress
from qvdit.method.started import StartedLayers
from qvdit.models.loading import WORLD_PIPELINE, SourceModel, find_model
from qvdit.settings import (
    JobSettings,
    calibration_plan,
    check_graph,
    check_target,
    check_weight_only,
    choose_compute,
    choose_edge,
    choose_recipe,
    quality_trial,
)
from qvdit.stages import Stages
from qvdit.system import cpu_name, tool_versions

STAGES = ("calibrate", "statistics", "quantize", "trace", "export", "parity", "speed", "quality")
# Changes whenever what is traced does: by whether attention is fusable.
_TRACE = {True: "attention as product, softmax and product", False: "attention as PyTorch translates it"}
# Changes whenever a TensorRT bundle's graphs do.
_GRAPHS = (
    "opset 17, softmax and rotary embeddings in 16 bits, products by weights in float32, GELU, LayerNorm, attention in "
    "the plugin"
)

Observe = Callable[[str], Any]
"""Called with a stage's name; returns a context manager that gives the stage's progress callback."""


@contextmanager
def unobserved(_: str) -> Iterator[Progress]:
    """Show nothing."""
    yield no_progress


class Job:
    """One model on its way to one bundle. Every stage can be run again; what is finished is reused."""

    def __init__(self, settings: JobSettings, observe: Observe = unobserved):
        self.settings, self.observe = settings, observe
        self.bits = Bits.parse(settings.bits)
        self.recipe = choose_recipe(settings)
        check_target(settings.target)
        self.edge_device = choose_edge(settings)
        check_weight_only(settings, self.recipe)
        check_graph(settings)
        quantization.check_bits(self.recipe, self.bits)
        self.device = choose_compute(settings.compute)
        self.source: SourceModel = find_model(settings.model)
        self.plan = calibration_plan(settings, self.source, self.device)
        self.trial = quality_trial(settings)
        self.out = settings.out
        self.replaced: str | None = None  # recipe and bits of the bundle that this job took the place of
        self.work = self.out / "work"
        self._claim_output()
        self.stages = Stages(self.work / "stages", self.out)
        self.calibration_folder = settings.calibration or self.work / "calibration"
        self.calibration_stages = Stages(self.calibration_folder / "stages", self.calibration_folder)

    # What the stages share -------------------------------------------------------------------------------------------

    @cached_property
    def pipeline(self) -> Any:
        """The full-precision pipeline, loaded when a stage first needs it."""
        return self.source.load(self.device)

    @property
    def sites(self) -> list[Any]:
        """The linears that may be quantized."""
        return self.source.adapter.sites(self.pipeline.transformer)

    @property
    def data(self) -> calibration.CalibrationData:
        """The calibration shards."""
        folder = self.calibration_folder / "shards"
        return calibration.CalibrationData(
            tuple(calibration.shard_path(folder, index) for index in range(len(self.plan.prompts)))
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The frozen layers, read back from the checkpoint."""
        return checkpoint.load(self.out / "quantized").layers

    def example(self) -> dict[str, torch.Tensor]:
        """A guided pass in the middle of a trajectory, FP16-representable: batch of 2."""
        batches = list(calibration.CalibrationData(self.data.shards[:1]).batches())
        batch = batches[len(batches) // 2]
        # A pipeline that makes its two passes one after the other leaves them as two records of one step.
        return {name: tensor[:2].half().float() for name, tensor in batch.items()}

    # The stages ------------------------------------------------------------------------------------------------------

    def run(self, last: str = "quality") -> None:
        """Run the stages up to ``last``, reusing what is finished."""
        try:
            self._run(last)
        except QvditError:
            self._disown_empty()
            raise

    def _run(self, last: str) -> None:
        if self.settings.layer_bits:
            self._check_layer_bits()
        if self.settings.target == "tensorrt" and self.recipe.kind == "dynamic":
            self._check_plugin()
        if self.settings.weight_only:
            self._check_weight_only()
        for name in STAGES[: STAGES.index(last) + 1]:
            with self.observe(name) as progress:
                getattr(self, name)(progress)
        if last == STAGES[-1] and self.edge_device:
            with self.observe("edge") as progress:
                self.edge(progress)

    def calibrate(self, progress: Progress) -> None:
        """Sample the full-precision model and record its inputs."""
        folder = self.calibration_folder / "shards"
        if self.settings.calibration:  # before the stage, which begins by forgetting the last one
            calibration.refuse_foreign(self.plan, folder)
        self.calibration_stages.run(
            "calibrate",
            dataclasses.asdict(self.plan),
            lambda: list(self.data.shards),
            lambda: calibration.record(self.pipeline, self.source.adapter, self.plan, folder, progress),
        )

    def statistics(self, progress: Progress) -> None:
        """Statistics of every layer's input."""
        path = self.calibration_folder / "statistics.safetensors"
        data = self.calibration_stages.result("calibrate")
        # Partial sums of other data must not be taken up: they are kept under the data's key until they are whole.
        partial = path.with_name(f"statistics-{data[:12]}.partial.safetensors")

        def collect() -> None:
            statistics.collect(self.pipeline.transformer, self.sites, self.data, partial, progress)
            partial.replace(path)

        self.calibration_stages.run("statistics", [data, statistics.FORMAT], lambda: [path], collect)

    def quantize(self, progress: Progress) -> None:
        """Quantize, and refine by distillation where there is a budget."""
        steps = self.recipe.distillation_steps(self.device, self.settings.distillation_steps)
        folder = self.out / "quantized"
        depends = [
            self.calibration_stages.result("statistics"),
            dataclasses.asdict(self.recipe),
            str(self.bits),
            steps,
            self.settings.seed,
            self.device,
        ]
        started = StartedLayers(self.work / "started" / self.stages.key("quantize", depends)[:16])

        def work() -> None:
            self._withdraw()
            stats = statistics.load(self.calibration_folder / "statistics.safetensors")
            job = quantization.QuantizationJob(self.recipe, self.bits, steps, self.settings.seed)
            layers = quantization.quantize(
                self.pipeline.transformer, self.source.adapter, stats, self.data, job, progress, started
            )
            fields = (self.source.adapter.family, self.source.fingerprint, self.source.config)
            checkpoint.save(checkpoint.QuantizedCheckpoint(layers, *fields, self.recipe.name, str(self.bits)), folder)

        self.stages.run("quantize", depends, lambda: [folder / checkpoint.CONFIG, folder / checkpoint.WEIGHTS], work)
        shutil.rmtree(started.folder.parent, ignore_errors=True)  # this job's, and what others left that were stopped

    def trace(self, _: Progress) -> None:
        """Trace the transformer once, for every bit width, and write the full-precision baseline."""
        from qvdit.export import graph
        from qvdit.export.files import save_model
        from qvdit.export.trace import trace

        written: list[Path] = []
        fusable = self.recipe.kind != "static" or self.settings.target != "tensorrt"

        def work() -> None:
            transformer, sites = self.pipeline.transformer, self.sites
            widths = {site.name: transformer.get_submodule(site.name).out_features for site in sites}
            traced = trace(transformer, self.source.adapter, widths, self.example(), fusable_attention=fusable)
            written.extend(save_model(traced, self.work / "traced.onnx"))
            written.extend(save_model(graph.baseline_model(traced, self._full_weights()), self.work / "baseline.onnx"))

        self.stages.run("trace", [self.calibration_stages.result("calibrate"), _TRACE[fusable]], lambda: written, work)

    def export(self, progress: Progress) -> None:
        """Write the ONNX files, what is not quantized, and the manifest that makes the folder a bundle."""
        from qvdit.export.bundle import export_onnx
        from qvdit.export.tensorrt import TracedModel, export_tensorrt, export_weight_only
        from qvdit.magnitudes import largest_values
        from qvdit.models import kept

        written: list[Path] = []

        def work() -> None:
            self._withdraw()
            full = self._full_weights() if self._kept_layers() else {}
            written.extend(export_onnx(self.work / "traced.onnx", self.layers, full, self.out, progress))
            kept.save(self.pipeline.transformer, (layer.name for layer in self.layers), self.out / KEPT_WEIGHTS)
            written.append(self.out / KEPT_WEIGHTS)
            if self.settings.target == "tensorrt":
                example = {name: tensor.numpy() for name, tensor in self.example().items()}
                largest = largest_values(self.work / "baseline.onnx", example, self.settings.threads)
                traced = TracedModel(self.work / "traced.onnx", self.layers, full, largest)
                low, own_attention = PRECISIONS[self.settings.precision], self.settings.attention == "plugin"
                written.extend(export_tensorrt(traced, self.out, low, own_attention=own_attention))
                written.extend(export_weight_only(traced, self.out, low) if self.settings.weight_only else [])

        # A folder exported before its bundle held KEPT_WEIGHTS, or for TensorRT as another graph, is exported again.
        target = [self.settings.target, *([_GRAPHS, TENSORRT_LAYERS] if self.settings.target == "tensorrt" else [])]
        target += [TENSORRT_INT4_MODEL] if self.settings.weight_only else []
        target += [self.settings.attention] if self.settings.attention != "plugin" else []
        target += [self.settings.precision] if self.settings.precision != "fp16" else []
        key = [self.stages.result("quantize"), self.stages.result("trace"), *target, KEPT_WEIGHTS]
        self.stages.run("export", key, lambda: written, work)
        self._keep_manifest()

    def parity(self, progress: Progress) -> None:
        """PyTorch's quantized model against the runtime, layer by layer and whole; saves a reference for devices."""
        from qvdit.proof import prove

        def work() -> None:
            write_json(
                self.work / "parity.json",
                prove(
                    self.pipeline.transformer, self.layers, self.example(), self.out, self.settings.threads, progress
                ),
            )

        files = [self.out / PARITY_INPUTS, self.out / PARITY_REFERENCE, self.work / "parity.json"]
        self.stages.run("parity", self.stages.result("export"), lambda: files, work)

    def speed(self, progress: Progress) -> None:
        """Time one forward pass and one large linear in ONNX Runtime, full precision beside quantized."""
        from qvdit.speed import measure_speed

        path = self.work / "speed.json"

        def work() -> None:
            inputs = {name: tensor.numpy() for name, tensor in self.example().items()}
            models = (self.work / "baseline.onnx", self.out / ORT_MODEL)
            write_json(path, measure_speed(*models, inputs, self.layers[0], self.settings.threads, progress))

        self.stages.run(
            "speed", [self.stages.result("export"), self.settings.threads, cpu_name()], lambda: [path], work
        )

    def quality(self, progress: Progress) -> None:
        """Sample the same videos with both models and measure them; then write the report from all stages."""
        from qvdit.quality import judge_videos

        path, videos = self.work / "quality.json", self.work / "videos.safetensors"

        def work() -> None:
            write_json(path, judge_videos(self.pipeline, self.out, self.trial, videos, self.settings.threads, progress))

        key = [self.stages.result("export"), described(self.trial)]
        self.stages.run("quality", key, lambda: [path, videos], work)
        self.report()

    def edge(self, progress: Progress) -> None:
        """Write the folder that is copied to the device: needs every other stage, and is none of the report."""
        from qvdit.export.cross import MissingToolError
        from qvdit.export.edge import EdgeContents, export_edge, source_files

        assert self.edge_device is not None
        folder, sources = self.out / EDGE, Path(qvdit.runtimes.__file__).parent / "csrc"
        tools = self._edge_tools()

        def work() -> None:
            contents = EdgeContents(self.edge_device, sources, tools, self._sampling_plan())
            export_edge(self.out, contents, folder)

        stages = [self.stages.result(name) for name in ("export", "parity", "quality")]
        made_of = [str(tools) if isinstance(tools, MissingToolError) else repr(tools), repr(self.edge_device)]
        held = [sha256(sources / name) for name in source_files(sources)]
        half = self.out / PARITY_HALF  # of no stage: a GPU leaves it, maybe long after
        held += [sha256(half)] if half.is_file() else []
        self.stages.run(
            "edge", [stages, made_of, held], lambda: [path for path in folder.rglob("*") if path.is_file()], work
        )

    def _edge_tools(self) -> Any:
        """What compiles the plugin for the device; why nothing does; None where the model has no use for it."""
        from qvdit.export.cross import MissingToolError, find_toolchain

        if self.recipe.kind == "static":
            return None
        gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        own = "".join(map(str, gpu)) if gpu else None
        try:
            return find_toolchain(
                self.edge_device, {"90": "90a", "100": "100a"}.get(own or "", own), platform.machine()
            )
        except MissingToolError as reason:
            return reason

    def _sampling_plan(self) -> Any:
        """The report's first video as numbers; None where the pipeline is not the drawn world's."""
        from safetensors.torch import load_file

        from qvdit.export.plan import plan_sampling

        if self.source.pipeline != WORLD_PIPELINE:
            return None
        trial = self.trial
        first = load_file(self.work / "videos.safetensors")["quantized"][:1].numpy()
        return plan_sampling(
            self.pipeline,
            lambda pipe: calibration.sample(pipe, [trial.prompts[0]], trial.steps, trial.guidance, [trial.seeds[0]]),
            trial.guidance,
            clamp=True,
            reference=first,
        )

    # The report ------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Write report.json and report.html from what the stages left; returns the former."""
        from qvdit.quality import report_videos
        from qvdit.report import write_html

        size = WeightSize.of(self.layers)
        costs = {**self.calibration_stages.costs, **self.stages.costs}
        content = {
            "model": self.source.name,
            "recipe": self.recipe.name,
            "bits": str(self.bits),
            "target": self.settings.target,
            "date": date.today().isoformat(),
            "versions": tool_versions(),
            "machine": {"cpu": cpu_name(), "threads": self.settings.threads},
            "parity": read_json(self.work / "parity.json", "the parity stage's result"),
            "size": {
                "weights_fp16_bytes": size.fp16_bytes,
                "weights_quantized_bytes": size.quantized_bytes,
                "ratio": size.quantized_bytes / size.fp16_bytes,
                "effective_weight_bits": size.effective_bits,
                "nominal_weight_bits": size.nominal_bits,
                "files": {name: (self.out / name).stat().st_size for name in self._model_files()},
            },
            "speed": read_json(self.work / "speed.json", "the speed stage's result"),
            "quality": read_json(self.work / "quality.json", "the quality stage's result"),
            "stages": {name: dataclasses.asdict(costs[name]) for name in STAGES},
        }
        write_json(self.out / "report.json", content)
        write_html(content, report_videos(self.work / "videos.safetensors", self.trial), self.out / "report.html")
        return content

    # Details ---------------------------------------------------------------------------------------------------------

    def _claim_output(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise QvditError(f"--out {self.out}, which is a file", "a folder", "choose another --out")
        self.made_output = not self.out.exists()
        owner = self.work / "owner.json"
        if owner.is_file():
            content = read_json(owner, "the note of whose folder this is")
            if content.get("source") != self.source.fingerprint:
                raise QvditError(
                    f"--out {self.out}, which belongs to another model ({content.get('model')})",
                    "an empty folder, or one of this model",
                    "choose another --out",
                )
            return
        if self.out.exists() and any(path != self.work for path in self.out.iterdir()):
            raise QvditError(f"--out {self.out}, which holds other files", "an empty folder", "choose another --out")
        write_json(owner, {"model": self.source.name, "source": self.source.fingerprint})

    def _disown_empty(self) -> None:
        """Give back an output folder in which nothing was made: another model, or this one mended, may have it."""
        owner = self.work / "owner.json"
        if [path for path in self.out.rglob("*") if not path.is_dir()] != [owner]:
            return
        owner.unlink()
        for folder in sorted(self.out.rglob("*"), reverse=True):
            folder.rmdir()
        if self.made_output:
            self.out.rmdir()

    def _check_layer_bits(self) -> None:
        """Refuse a pattern of the user's that no layer's name matches."""
        names = [site.name for site in self.sites]
        for glob in self.settings.layer_bits:
            if not fnmatch.filter(names, glob):
                raise QvditError(
                    f"--layer-bits {glob!r}, which no layer matches",
                    f"a pattern for the names {names[0]} … {names[-1]}",
                    "check the pattern",
                )

    def _check_plugin(self) -> None:
        """Refuse layers that the TensorRT plugin will not compute, before hours are spent on them."""
        from qvdit.export.plugin import refuse_unserved

        reasons = {}
        for site in self.sites:
            linear = self.pipeline.transformer.get_submodule(site.name)
            k = linear.in_features
            group = group_size(k, self.recipe.weights.group)
            rank = min(self.recipe.tqe.rank, *linear.weight.shape)
            if self.recipe.weight_bits(site.name, self.bits.weight) != 16:
                reasons[site.name] = unserved_shape(k, group, rank)
        refuse_unserved(reasons)

    def _check_weight_only(self) -> None:
        """Refuse layers whose weights INT4 in blocks cannot hold, before hours are spent on them."""
        from qvdit.export.weight_only import refuse_unfit, unfit_shape

        reasons = {}
        for site in self.sites:
            k = self.pipeline.transformer.get_submodule(site.name).in_features
            bits = self.recipe.weight_bits(site.name, self.bits.weight)
            rotation = rotation_block(k) if self.recipe.rotates(self.bits) else 0
            symmetric, group = self.recipe.weights.symmetric_from <= bits, group_size(k, self.recipe.weights.group)
            if bits != 16:
                reasons[site.name] = unfit_shape(bits, symmetric, rotation, k, group)
        refuse_unfit(reasons)

    def _withdraw(self) -> None:
        """Take away, manifest first, what tells of an earlier export: from here on the folder is no whole bundle."""
        if (self.out / MANIFEST).is_file():
            with contextlib.suppress(QvditError):
                there = read_manifest(self.out)
                self.replaced = f"{there.recipe} {there.bits}"
        stale = (MANIFEST, KEPT_WEIGHTS, PARITY_INPUTS, PARITY_REFERENCE, PARITY_HALF, "report.json", "report.html")
        models = (QDQ_MODEL, ORT_MODEL, TENSORRT_MODEL, TENSORRT_INT4_MODEL, TENSORRT_LAYERS)
        for name in (*stale, *models, *(f"{model}.data" for model in models)):
            (self.out / name).unlink(missing_ok=True)
        (self.out / EDGE / MANIFEST).unlink(missing_ok=True)

    def _kept_layers(self) -> bool:
        return len(self.layers) < len(self.sites)

    def _full_weights(self) -> dict[str, tuple[Any, Any]]:
        weights = {}
        for site in self.sites:
            linear = self.pipeline.transformer.get_submodule(site.name)
            bias = None if linear.bias is None else linear.bias.detach().float().cpu().numpy()
            weights[site.name] = (linear.weight.detach().float().cpu().numpy(), bias)
        return weights

    def _model_files(self) -> list[str]:
        names = [f"quantized/{checkpoint.CONFIG}", f"quantized/{checkpoint.WEIGHTS}", KEPT_WEIGHTS]
        names += [QDQ_MODEL, ORT_MODEL]
        names += [TENSORRT_MODEL, TENSORRT_LAYERS] if self.settings.target == "tensorrt" else []
        names += [TENSORRT_INT4_MODEL] if self.settings.weight_only else []
        names += [f"{name}.data" for name in names if name.endswith(".onnx")]
        return [name for name in names if (self.out / name).is_file()]

    def _keep_manifest(self) -> None:
        """Write the manifest unless the very same one is there: a damaged one is mended."""
        manifest = self._manifest()
        try:
            there = read_manifest(self.out)
        except QvditError:
            there = None
        if there != manifest:
            write_manifest(self.out, manifest)

    def _manifest(self) -> Manifest:
        adapter = self.source.adapter
        example = self.example()
        inputs = {
            name: [adapter.dynamic_axes[name].get(axis, size) for axis, size in enumerate(example[name].shape)]
            for name in adapter.inputs
        }
        return Manifest(
            model=self.source.name,
            source=self.source.fingerprint,
            family=adapter.family,
            class_name=adapter.class_name,
            source_config=self.source.config,
            recipe=self.recipe.name,
            bits=str(self.bits),
            target=self.settings.target,
            inputs=inputs,
            frames=adapter.frames(self.source.config, example),
            versions=tool_versions(),
            files={name: sha256(self.out / name) for name in self._model_files()},
            size=None if self.settings.size is None else str(self.settings.size),
            precision=None if self.settings.precision == "fp16" else self.settings.precision,
        )
