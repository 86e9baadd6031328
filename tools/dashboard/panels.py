"""What the Grafana dashboard shows: rows of panels, each a question and the queries that answer it.

``$app`` in a query stands for the labels by which Grafana chooses one app, ``$cluster`` for those of its machines.
"""

from typing import NamedTuple


class Query(NamedTuple):
    """A query of Prometheus and how its lines are called; ``{{label}}`` is the value of a label."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """One panel. unit: as Grafana names it."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    needs_gpu: bool = False


class Row(NamedTuple):
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def _quantiles(metric: str, *labels: str) -> tuple[Query, ...]:
    """The median of a histogram and what one in twenty is above, over these labels."""
    by = ", ".join(("le", *labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{$app}}[$__rate_interval])))",
            f"{name} {legend}",
        )
        for share, name in ((0.5, "p50"), (0.95, "p95"))
    )


def _rate(metric: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) (rate({metric}{{$app}}[$__rate_interval]))"


def _rate_or_zero(metric: str, *labels: str) -> str:
    """As ``_rate``, and 0 while there is no such counter: Ray shows one from its first event on."""
    return f"{_rate(metric, *labels)} or vector(0)"


ROWS = (
    Row(
        "Videos",
        (
            Panel(
                "Videos that ended, a minute",
                "By outcome: completed, cancelled, or the code of the error.",
                "short",
                (Query(f"60 * {_rate('ray_pyramid_serve_videos_total', 'outcome')}", "{{outcome}}"),),
            ),
            Panel(
                "Queue",
                "Videos that wait for a denoiser, that are being made, and that may wait at most.",
                "short",
                (
                    Query("sum(ray_pyramid_serve_videos_queued{$app})", "queued"),
                    Query("sum(ray_pyramid_serve_videos_in_progress{$app})", "in progress"),
                    Query("sum(ray_pyramid_serve_videos_queued_limit{$app})", "limit"),
                ),
            ),
            Panel(
                "Oldest video that waits",
                "Since its acceptance; 0 when none waits.",
                "s",
                (Query("max(ray_pyramid_serve_oldest_queued_seconds{$app})", "oldest"),),
            ),
            Panel(
                "Wait in the queue",
                "From acceptance until a denoiser first worked on the video.",
                "s",
                _quantiles("ray_pyramid_serve_queue_wait_seconds", "model", "size"),
            ),
            Panel(
                "Time to first frame",
                "From acceptance.",
                "s",
                _quantiles("ray_pyramid_serve_time_to_first_frame_seconds", "model", "size"),
            ),
            Panel(
                "Time of a whole video",
                "From acceptance to its file.",
                "s",
                _quantiles("ray_pyramid_serve_video_seconds", "model", "size"),
            ),
            Panel(
                "Real-time factor",
                "Seconds of making for a second of one video, without its wait in the queue.",
                "short",
                _quantiles("ray_pyramid_serve_real_time_factor", "model", "size"),
            ),
            Panel(
                "Seconds of video made, a second",
                "All videos together: the throughput.",
                "short",
                (Query(_rate("ray_pyramid_serve_made_video_seconds_total", "model", "size"), "{{model}} {{size}}"),),
            ),
            Panel(
                "Share of decoding that is hidden",
                "How much of a video's decoding ran while later units of it were denoised.",
                "percentunit",
                _quantiles("ray_pyramid_serve_decode_hidden_share", "model", "size")[:1],
            ),
        ),
    ),
    Row(
        "Pools",
        (
            Panel(
                "Time of a unit, by stage",
                "Waiting left out. encode: both prompts of a video; save: a unit's fragment, or the file.",
                "s",
                _quantiles("ray_pyramid_serve_stage_seconds", "stage"),
            ),
            Panel(
                "Pack size",
                "Units (of the text encoder, prompts) in one forward, on average.",
                "short",
                (
                    Query(
                        f"{_rate('ray_pyramid_serve_slots_total', 'deployment')}"
                        f" / {_rate('ray_pyramid_serve_forward_slots_count', 'deployment')}",
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Tokens of a forward",
                "On average; to be compared with the token budget of the denoiser.",
                "short",
                (
                    Query(
                        f"{_rate('ray_pyramid_serve_tokens_total', 'deployment')}"
                        f" / {_rate('ray_pyramid_serve_forward_tokens_count', 'deployment')}",
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Time of a forward",
                "The longest time that anything in the pack is held up.",
                "s",
                _quantiles("ray_pyramid_serve_forward_seconds", "deployment"),
            ),
            Panel(
                "Busy share of each replica",
                "The share of time in which its compute thread works, on a GPU or a CPU.",
                "percentunit",
                (
                    Query(
                        _rate("ray_pyramid_serve_busy_seconds_total", "deployment", "replica"),
                        "{{deployment}} {{replica}}",
                    ),
                ),
            ),
            Panel(
                "Waiting in replicas",
                "Units or prompts that are in a replica and not in its forward, at most. Idle replicas report none.",
                "short",
                (
                    Query(
                        "sum by (deployment) (max_over_time(ray_pyramid_serve_queue_depth{$app}[$__rate_interval]))",
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Replicas",
                "Those that are healthy, and those that Serve wants (target).",
                "short",
                (
                    Query("sum by (deployment) (ray_serve_deployment_replica_healthy{$app})", "{{deployment}}"),
                    Query("max by (deployment) (ray_serve_autoscaling_target_replicas{$app})", "{{deployment}} target"),
                ),
            ),
        ),
    ),
    Row(
        "Trouble",
        (
            Panel(
                "Calls made again, a minute",
                "By cause. A lost call costs at most a unit.",
                "short",
                (Query(f"60 * ({_rate_or_zero('ray_pyramid_serve_calls_retried_total', 'cause')})", "{{cause}}"),),
            ),
            Panel(
                "Health checks that failed, a minute",
                "A replica that died counts as one.",
                "short",
                (
                    Query(
                        f"60 * ({_rate_or_zero('ray_serve_health_check_failures_total', 'deployment')})",
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Refusals of the storage, a minute",
                "By the deployment that needed it.",
                "short",
                (
                    Query(
                        f"60 * ({_rate_or_zero('ray_pyramid_serve_storage_failures_total', 'deployment')})",
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Forwards out of memory, a minute",
                "The token budget is halved, and grows again after some forwards that go well.",
                "short",
                (
                    Query(
                        f"60 * ({_rate_or_zero('ray_pyramid_serve_out_of_memory_total', 'deployment')})",
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Since claims last looked after the videos",
                "Usually a second, and ten more until Ray has reported it.",
                "s",
                (Query("time() - max(ray_pyramid_serve_sweep_timestamp_seconds{$app})", "last sweep"),),
            ),
            Panel(
                "Records that cannot be read",
                "Broken files in the storage.",
                "short",
                (Query("max(ray_pyramid_serve_records_unreadable{$app})", "unreadable"),),
            ),
        ),
    ),
    Row(
        "Machines",
        (
            Panel(
                "CPU",
                "Of each node.",
                "percent",
                (Query("ray_node_cpu_utilization{$cluster}", "{{ip}}"),),
            ),
            Panel(
                "Memory",
                "Of each node (in a pod, of its limit).",
                "percentunit",
                (Query("ray_node_mem_used{$cluster} / ray_node_mem_total{$cluster}", "{{ip}}"),),
            ),
            Panel(
                "Object store",
                "Frames and latents on their way from one replica to another.",
                "bytes",
                (Query("ray_object_store_used_memory{$cluster}", "{{NodeAddress}}"),),
            ),
            Panel(
                "GPU",
                "The driver's share of time in which a kernel ran.",
                "percent",
                (Query("ray_node_gpus_utilization{$cluster}", "{{ip}} {{GpuIndex}}"),),
                needs_gpu=True,
            ),
            Panel(
                "GPU memory",
                "What is taken, by the caching allocator too.",
                "mbytes",
                (Query("ray_node_gram_used{$cluster}", "{{ip}} {{GpuIndex}}"),),
                needs_gpu=True,
            ),
        ),
    ),
)
