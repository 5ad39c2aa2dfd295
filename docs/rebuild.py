"""Rebuilds the states of a compact trace between two key frames with nothing but numpy, bit for bit.

    python docs/rebuild.py FILE NAME STEP

prints the mean of a bfloat16 parameter that per-op Adam updated, as it was after a step; ``wte`` in a trace of the
reference run. docs/format.md describes the file.
"""

import json
import sys

import numpy as np

DTYPES = {"BF16": "<u2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "?"}


def read(path):
    """Return the tensors of a file by name, bfloat16 as uint16, and its metadata."""
    data = np.memmap(path, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] in DTYPES:
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[first:last].tobytes(), DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def widened(bits):
    """Return bfloat16, as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x):
    """Round float32 to the nearest bfloat16, ties to even; return it as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def fma(a, b, c):
    """Return ``a * b + c`` in float32, rounded once.

    In float64 the product of two float32 is exact, the sum is not. Rounding the sum again, to float32, would be wrong
    if it lay half-way by accident. So if the sum was rounded to a float64 with an even last bit, its neighbour on the
    other side of the true sum is taken: its last bit is odd, and it is never half-way.
    """
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    is_even = total.view(np.int64) % 2 == 0
    return np.where((error != 0) & is_even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def rebuild(path, name, step):
    """Return parameter, exp_avg and exp_avg_sq after a step, as float32 with the values of bfloat16."""
    tensors, metadata = read(path)
    optimizer = json.loads(metadata["optimizer"])
    assert optimizer["arithmetic"] == "per-op", optimizer
    param = optimizer["params"][name]
    keys, group = param["keys"], optimizer["groups"][param["group"]]
    (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
    rates = tensors["learning_rates"].reshape(len(tensors["learning_rates"]), -1)
    rates = rates[:, param["group"] if rates.shape[1] > 1 else 0]
    records = len(rates)
    clips = tensors.get("clip_coefs", np.ones(records, np.float32))
    updated = tensors.get(f"{name}.has_grad", np.ones(records, bool)) & ~tensors.get("skipped", np.zeros(records, bool))

    record = step - int(tensors["recorded_steps"][0])
    frames = tensors["keyframe_steps"] - tensors["recorded_steps"][0]
    frame = np.searchsorted(frames, record, side="right") - 1  # the last key frame before the step
    p, m, v = (widened(tensors[f"{keys[field]}.keyframes"][frame]) for field in ("param", "exp_avg", "exp_avg_sq"))
    for k in range(int(frames[frame]) + 1, record + 1):
        if not updated[k]:
            continue
        t = param["steps_done"] + int(updated[1 : k + 1].sum())
        decay, weight1, weight2 = (np.float32(x) for x in (1 - rates[k] * weight_decay, 1 - beta1, 1 - beta2))
        root, step_size = np.float32((1 - beta2**t) ** 0.5), np.float32(-(rates[k] / (1 - beta1**t)))
        g = rounded(widened(tensors[keys["grad"]][k]) * rounded(clips[k]))
        p = rounded(p * decay)
        m = rounded(fma(weight1, g - m, m) if weight1 < 0.5 else fma(1 - weight1, -(g - m), g))
        v = rounded(fma(weight2 * g, g, rounded(v * np.float32(beta2))))
        denominator = rounded(rounded(rounded(np.sqrt(v)) / root) + rounded(eps))
        p = rounded(p + step_size * m / denominator)
    return p, m, v


if __name__ == "__main__":
    print(rebuild(sys.argv[1], sys.argv[2], int(sys.argv[3]))[0].mean())
