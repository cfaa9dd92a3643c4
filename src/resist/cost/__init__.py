"""Cost: predict traffic, memory and time of strategies without training.

    strategies = [resist.resist(workers=4), resist.local_sgd(workers=4)]
    report = predict(build_model, strategies, link=Link(gbit_s=1, latency_ms=0.2), speed=Speed(images_s=2000))
    print_table(report, Console())
    report.to_json()

Predictions come from plans, schedules and tensors on the meta device. sizes.py has the parts of a network, states.py
the state of an optimizer; traffic.py counts messages, footprint.py memory and FLOPs, gpu.py what a GPU holds beside
them, links.py connections, timing.py seconds; predict.py combines them. probe.py measures the links of a job.
"""

from resist.cost.footprint import Memory, Network
from resist.cost.gpu import GpuMemory, GpuSettings
from resist.cost.links import Link
from resist.cost.predict import predict
from resist.cost.report import Report, Row, print_table
from resist.cost.timing import Seconds, Speed, calibrate
from resist.cost.traffic import Traffic

__all__ = [
    "GpuMemory", "GpuSettings", "Link", "Memory", "Network", "Report", "Row", "Seconds", "Speed", "Traffic",
    "calibrate", "predict", "print_table",
]  # fmt: skip
