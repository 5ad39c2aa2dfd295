"""Rerun: the cloud, its image and the values of each step, along the timeline ``step``."""

from __future__ import annotations

from pathlib import Path

import rerun as rr
import torch
from torch import Tensor

from bhfast import lattice
from bhfast.export.values import Source
from bhfast.report.player import MAX_RECORDS, principal_axes, sampled_records

MAX_TOKENS = 10_000  # in the cloud
MIDDLE, REACH = 128, 127  # the shade of zero in an image, and how many there are on each side of it; 0 is not finite


def write(source: Source, file: Path) -> list[str]:
    """Write the file; return what was left out, a line each."""
    recording = rr.RecordingStream("bhfast", recording_id=source.trace.path.name)
    recording.save(file)
    for steps, values in source.step_blocks():
        time = rr.TimeColumn("step", sequence=steps.numpy())
        for name, x in values.items():
            recording.send_columns(f"values/{name}", [time], rr.Scalars.columns(scalars=x.numpy()))
    notes = [] if source.found is None else _log_vectors(source, recording)
    recording.flush()
    recording.disconnect()
    return notes


def _log_vectors(source: Source, recording: rr.RecordingStream) -> list[str]:
    """Log the cloud in the three principal axes of its last record, and the vectors as images, of some records."""
    assert source.found is not None
    vectors = source.found.vectors
    records = sampled_records(len(source.steps), MAX_RECORDS)
    shown = torch.linspace(0, len(source.names) - 1, min(len(source.names), MAX_TOKENS), dtype=torch.float64)
    which = shown.round().long()
    last = vectors[-1].as_subclass(Tensor)
    directions = torch.zeros(3, vectors.shape[2], dtype=torch.float64)
    axes, _ = principal_axes(last[which])
    directions[: len(axes)] = axes
    reach = max(float(last[last.isfinite()].abs().max()) if last.isfinite().any() else 0.0, 1e-30)
    labels = [source.names[i] for i in which.tolist()]
    for record in records.tolist():
        whole = vectors[record].as_subclass(Tensor)
        own = whole[which].double()
        recording.set_time("step", sequence=int(source.steps[record]))
        cloud = (own - lattice.centroid(whole)) @ directions.T
        recording.log("cloud", rr.Points3D(cloud.float().numpy(), labels=labels, show_labels=False))
        recording.log("vectors", rr.Image(_shades(own / reach).numpy(), color_model="L"))
    notes = []
    if len(records) < len(source.steps):
        notes.append(f"cloud and image of all but {len(records)} of {len(source.steps):,} records; values are of all")
    if len(which) < len(source.names):
        notes.append(f"all but {len(which):,} of {len(source.names):,} tokens in the cloud, evenly spaced")
    return notes


def _shades(values: Tensor) -> Tensor:
    """Return values from -1 to 1 as shades, uint8."""
    shades = (values.clamp(-1, 1) * REACH + MIDDLE).round()
    return shades.where(values.isfinite(), 0).to(torch.uint8)
