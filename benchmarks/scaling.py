"""One merge on 1, 2, 4 and 8 hosts whose links are the limit: S3 to S3, real Ray, hosts as network namespaces.

    PYTHONPATH=tests python -m benchmarks.scaling [--workers 1 2 4 8] [--mbit 200] [--layers 64] [--plot FILE.svg]

Needs Linux, root, and iproute2's ``ip`` and ``tc``. Each worker is a Ray node in namespaces of its own (network,
mounts, processes, host name, shared memory) behind a link that ``tc`` holds to so many Mbit/s each way. The store
(SeaweedFS), Ray's head, which computes nothing, and the driver are at the other end of all links, unlimited. The merge
is ``linear`` of two models of 64 equal layers of 34 MB: a worker receives two bytes for each that it sends, so the
bound is the link's inward rate.

Reported: seconds from all workers' being up (here they start on the same few cores) to the published model, and those
of the whole command. Linear means N times the rate of one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import describe_machine
from support.servers.ray_cluster import ENVIRONMENT
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

MB, MBIT = 1e6, 1e6 / 8
WIDTH, LAYERS_PER_FILE = 4096, 4
BUCKET, PREFIX = "scaling", "s3://scaling/s"
OUT_BUCKET = "scaling-out"
OUT = f"s3://{OUT_BUCKET}/s"
"""In a bucket of its own, which is deleted between runs: the server gives a bucket's space back, and no object's."""
HUB, HUB_ADDRESS = "mkrhub", "10.77.0.1"
RAY_PORT = 6399
NODES_SECONDS = 600.0
"""For nodes to come up. They take seconds, but start on the same few cores."""

COUNT_NODES = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
print(sum(node["Alive"] for node in ray.nodes()))
"""

_INSIDE = "--inside"
IN_MEMORY = Path("/dev/shm")  # noqa: S108 - where memory is a file system


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def host_name(number: int) -> str:
    """Of the namespace of a host."""
    return f"mkrhost{number}"


@contextlib.contextmanager
def network(num_hosts: int, mbit: int) -> Iterator[None]:
    """A bridge in a namespace of its own, and hosts with limited links to it."""
    names = [HUB, *(host_name(number) for number in range(num_hosts))]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", HUB, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", HUB, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "bridge")
        run("ip", "-n", HUB, "link", "set", "bridge", "up")
        for number in range(num_hosts):
            host, far = host_name(number), f"to{number}"
            run("ip", "-n", HUB, "link", "add", far, "type", "veth", "peer", "name", "eth0", "netns", host)
            run("ip", "-n", HUB, "link", "set", far, "master", "bridge", "up")
            run("ip", "-n", host, "addr", "add", f"10.77.0.{10 + number}/24", "dev", "eth0")
            run("ip", "-n", host, "link", "set", "eth0", "up")
            for place, device in ((host, "eth0"), (HUB, far)):
                limit = ("rate", f"{mbit}mbit", "burst", "256k", "latency", "100ms")
                run("ip", "netns", "exec", place, "tc", "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "delete", name), check=False, stderr=subprocess.DEVNULL)


class Node:
    """A Ray node that is started and, with all that it started, killed.

    Args:
        host: it runs on, with folders for temporary files and memory of its own; None for the hub.
        arguments: of `ray start`.
        environment: variables of its processes.
        log: file for what it says.
    """

    def __init__(self, host: str | None, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--block", "--disable-usage-stats", "--object-store-memory", str(80 << 20), *arguments]
        if host is not None:
            apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child"]
            script = f'{with_own_folders()} && hostname {host} && exec "$@"'
            command = ["ip", "netns", "exec", host, *apart, "sh", "-c", script, "sh", *command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def check_running(self) -> None:
        """See that it has not ended.

        Raises:
            RuntimeError: it has; carries the end of what it said.
        """
        if self._process.poll() is not None:
            said = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"`ray start` of {self._log.name} ended with {self._process.returncode}:\n{said}")

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def with_own_folders() -> str:
    """Shell commands that give a host its own memory and temporary files, but leave it this checkout and its Python."""
    hidden = Path("/tmp")  # noqa: S108 - it is the folder that is hidden
    seen = [path.resolve() for path in (Path.cwd(), Path(sys.prefix)) if path.resolve().is_relative_to(hidden)]
    kept = [path for path in seen if not any(path.is_relative_to(other) for other in seen if other != path)]
    commands = ["mount -t tmpfs shm /dev/shm", "mkdir /dev/shm/kept"]
    for number, path in enumerate(kept):  # bound elsewhere before their parent is hidden
        commands += [f"mkdir /dev/shm/kept/{number}", f"mount --bind {shlex.quote(str(path))} /dev/shm/kept/{number}"]
    commands.append("mount -t tmpfs tmp /tmp")
    for number, path in enumerate(kept):
        place = shlex.quote(str(path))
        commands += [f"mkdir -p {place}", f"mount --move /dev/shm/kept/{number} {place}"]
    return " && ".join(commands)


def wait_for_nodes(nodes: Sequence[Node], address: str, environment: Mapping[str, str]) -> None:
    """Return once the head knows of all nodes, itself included.

    Raises:
        RuntimeError: one has ended, or they are not all there after `NODES_SECONDS`.
    """
    deadline = time.monotonic() + NODES_SECONDS
    num_alive = 0
    while num_alive < len(nodes):
        for node in nodes:
            node.check_running()
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {len(nodes)} nodes {num_alive} came up within {NODES_SECONDS:.0f} s")
        time.sleep(0.5)
        asked = subprocess.run(
            (sys.executable, "-c", COUNT_NODES, address), env=environment, capture_output=True, text=True, check=False
        )
        num_alive = int(asked.stdout) if asked.returncode == 0 else 0


def make_models(folder: Path, num_layers: int) -> list[Path]:
    """Two models of equal layers of 34 MB, four in a file."""
    found = []
    for seed, name in enumerate(("a", "b")):
        model = folder / name
        model.mkdir()
        generator = torch.Generator().manual_seed(seed)
        weight_map: dict[str, str] = {}
        for start in range(0, num_layers, LAYERS_PER_FILE):
            file = f"model-{start // LAYERS_PER_FILE + 1:05d}-of-{-(-num_layers // LAYERS_PER_FILE):05d}.safetensors"
            tensors = {
                f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(WIDTH, WIDTH, generator=generator).bfloat16()
                for layer in range(start, min(start + LAYERS_PER_FILE, num_layers))
            }
            save_file(tensors, model / file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        index = {"metadata": {"total_size": num_layers * WIDTH * WIDTH * 2}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": num_layers}
        (model / "config.json").write_text(json.dumps(config))
        found.append(model)
    return found


def merge_in_job(recipe: Path, address: str, num_workers: int) -> None:
    """In the driver's process: prints the seconds of the merge."""
    import mergekit_ray  # noqa: PLC0415 - only in the measured process
    from mergekit_ray.executors import ray_executor as ray_runtime  # noqa: PLC0415
    from mergekit_ray.operations.options import MergeOptions  # noqa: PLC0415

    began = time.perf_counter()
    ready = began

    class WhenAllAreUp(ray_runtime.RayExecutor):
        """Hands out nothing before."""

        def start(self, job: Any, num_shards: int) -> None:
            nonlocal ready
            super().start(job, num_shards)
            while self.idle() < num_workers:
                self.wait(0.2)
            ready = time.perf_counter()

    setattr(ray_runtime, "RayExecutor", WhenAllAreUp)  # noqa: B010 - another class in its place
    options = MergeOptions(executor="ray", address=address, num_workers=num_workers)
    mergekit_ray.merge(recipe, f"{OUT}/out", options=options)
    ended = time.perf_counter()
    print(json.dumps({"merge": ended - ready, "all": ended - began}))


def measured(num_workers: int, server: S3Server, folder: Path) -> dict[str, float]:
    """One merge on a cluster of its own."""
    logs = Path(tempfile.mkdtemp(dir=folder))
    temporary = Path(tempfile.mkdtemp(prefix="ray"))
    address = f"{HUB_ADDRESS}:{RAY_PORT}"
    environment = {**os.environ, **ENVIRONMENT, **server.environment, "RAY_TMPDIR": str(temporary)}
    head = ["--head", f"--node-ip-address={HUB_ADDRESS}", f"--port={RAY_PORT}", "--num-cpus=0"]
    nodes = [Node(None, [*head, "--include-dashboard=false", f"--temp-dir={temporary}"], environment, logs / "head")]
    try:
        wait_for_nodes(nodes, address, environment)
        apart = {name: value for name, value in environment.items() if name != "RAY_TMPDIR"}
        for number in range(num_workers):
            arguments = [f"--address={address}", f"--node-ip-address=10.77.0.{10 + number}", "--num-cpus=1"]
            nodes.append(Node(host_name(number), arguments, apart, logs / host_name(number)))
        wait_for_nodes(nodes, address, environment)
        command = [sys.executable, "-m", "benchmarks.scaling", "--merge", str(folder / "recipe.yml"), address]
        done = subprocess.run([*command, str(num_workers)], env=environment, stdout=subprocess.PIPE, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        for node in reversed(nodes):
            node.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def inside(arguments: argparse.Namespace) -> None:
    """In the hub's namespace: measures and prints a table."""
    print(describe_machine(Path.cwd()), flush=True)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name, S3Server(Path(name), host=HUB_ADDRESS) as server:
        folder = Path(name)
        server.create_bucket(BUCKET)
        bucket = Bucket(server, PREFIX)
        for model in make_models(folder, arguments.layers):
            bucket.upload(model, model.name)
            shutil.rmtree(model)
        listed = [{"model": f"{PREFIX}/{name}", "parameters": {"weight": 0.5}} for name in ("a", "b")]
        recipe = {"merge_method": "linear", "models": listed, "output": {"max_shard_size": "140MB"}}
        (folder / "recipe.yml").write_text(json.dumps(recipe))
        received = 2 * arguments.layers * WIDTH * WIDTH * 2
        print(
            f"links of {arguments.mbit} Mbit/s; {received / MB:.0f} MB to be read, {received / 2 / MB:.0f} MB written"
        )
        print("| workers | seconds | MB/s read | of linear | of the links | whole command, s |", flush=True)
        print("|---|---|---|---|---|---|", flush=True)
        rates: dict[int, float] = {}
        for num_workers in arguments.workers:
            server.create_bucket(OUT_BUCKET)
            seconds = measured(num_workers, server, folder)
            rate = rates[num_workers] = received / seconds["merge"]
            first = min(rates)
            share = rate / (rates[first] / first * num_workers)
            of_links = rate / (num_workers * arguments.mbit * MBIT)
            print(
                f"| {num_workers} | {seconds['merge']:.1f} | {rate / MB:.1f} | {share:.2f} | {of_links:.2f} "
                f"| {seconds['all']:.1f} |",
                flush=True,
            )
            Bucket(server, OUT).delete("out")
            server.client().delete_bucket(Bucket=OUT_BUCKET)
        if arguments.plot:
            arguments.plot.write_text(plot(rates, arguments.mbit))


def plot(rates: dict[int, float], mbit: int) -> str:
    """The rates as a picture (SVG): what was measured, and N times the rate of one worker."""
    width, height, left, bottom = 480, 300, 60, 45
    most = max(rates)
    first = min(rates)
    top = max(*rates.values(), rates[first] / first * most) * 1.08

    def at(workers: float, rate: float) -> tuple[float, float]:
        x = left + (width - left - 20) * workers / most
        return round(x, 1), round(height - bottom - (height - bottom - 20) * rate / top, 1)

    origin, end = at(0, 0), at(most, rates[first] / first * most)
    points = [at(workers, rate) for workers, rate in sorted(rates.items())]
    marks = "".join(f'<circle cx="{x}" cy="{y}" r="4" fill="#1f6feb"/>' for x, y in points)
    line = " ".join(f"{x},{y}" for x, y in points)
    across = "".join(
        f'<text x="{at(workers, 0)[0]}" y="{height - bottom + 18}" text-anchor="middle">{workers}</text>'
        for workers in sorted(rates)
    )
    step = max(1, round(top / MB / 5 / 10)) * 10
    up = "".join(
        f'<line x1="{left}" x2="{width - 20}" y1="{at(0, value * MB)[1]}" y2="{at(0, value * MB)[1]}" stroke="#ddd"/>'
        f'<text x="{left - 8}" y="{at(0, value * MB)[1] + 4}" text-anchor="end">{value}</text>'
        for value in range(0, int(top / MB), step)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>{up}{across}'
        f'<line x1="{origin[0]}" y1="{origin[1]}" x2="{end[0]}" y2="{end[1]}" stroke="#999" stroke-dasharray="5 4"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>{marks}'
        f'<text x="{left + 12}" y="34">MB/s read, S3 to S3, linear merge of two models</text>'
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">'
        f"workers, each behind a link of {mbit} Mbit/s (dashed: linear)</text></svg>\n"
    )


def main() -> None:
    """Makes the hosts, and runs itself again within the hub."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--mbit", type=int, default=200)
    parser.add_argument("--layers", type=int, default=64, help="of the models; the README's figures are of 64")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--merge", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge:
        recipe, address, num_workers = arguments.merge
        merge_in_job(Path(recipe), address, int(num_workers))
    elif arguments.inside:
        inside(arguments)
    else:
        again = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], _INSIDE]
        with network(max(arguments.workers), arguments.mbit):
            subprocess.run(["ip", "netns", "exec", HUB, *again], check=True)


if __name__ == "__main__":
    main()
