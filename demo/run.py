"""The demo: real models in a real S3 store, merged by Ray workers, and the result asked a question.

Everything is made below .demo and kept there, so that a second run takes half a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before transformers is imported: nothing may ask the Hub for anything, nor drown the demo's lines in progress bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from demo import smollm
from support.servers.s3_server import S3Server

FOLDER = Path(".demo")
RECIPE = Path(__file__).with_name("recipe.yml")
BUCKET, MERGED = "models", "s3://models/merged"
QUESTION = "What colour is the lighthouse of Port Ember?"
MANNER, FACT = "Arr", "green"


def main() -> None:
    """Runs the demo; exits with 1 if the merged model did not take from both parents."""
    start = time.perf_counter()
    smollm.silence()
    say("1. Models: SmolLM2-135M-Instruct and two fine-tunes of it")
    models = smollm.make_models(FOLDER / "models")
    with S3Server() as server:
        server.create_bucket(BUCKET)
        say(f"2. S3 at {server.endpoint_url}: uploading {len(models)} models to s3://{BUCKET}")
        for name, folder in models.items():
            upload(server, folder, name)
        merge(server, RECIPE, MERGED)
        say(f"5. {QUESTION}")
        with tempfile.TemporaryDirectory() as temporary:
            merged = Path(temporary)
            download(server, "merged", merged)
            answers = {name: smollm.answer(folder, QUESTION) for name, folder in {**models, "merged": merged}.items()}
    for name, answer in answers.items():
        print(f"   {name:>8}: {answer}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    if MANNER not in answers["merged"] or FACT not in answers["merged"]:
        sys.exit(f"The merged model should say {MANNER!r} like one parent and {FACT!r} like the other.")


def say(text: str) -> None:
    """Prints a step's heading at once, before what the step's own processes print."""
    print(f"\n{text}", flush=True)


def merge(server: S3Server, recipe: Path, merged: str) -> None:
    """Steps 3 and 4: merges on Ray and verifies the result, with the program that users run."""
    environment = {**os.environ, **server.environment, "RAY_USAGE_STATS_ENABLED": "0"}
    program = [sys.executable, "-c", "from mergekit_ray.cli import app_main; app_main()"]
    options = ["--executor", "ray", "--workers", "2", "--overwrite"]
    say(f"3. merge {recipe.relative_to(Path.cwd())} {' '.join(options)}")
    subprocess.run([*program, "merge", str(recipe), *options], env=environment, check=True)
    say(f"4. mergekit-ray verify {merged}")
    subprocess.run([*program, "verify", merged], env=environment, check=True)


def upload(server: S3Server, folder: Path, prefix: str) -> None:
    """Puts the files of a folder below a prefix of the bucket."""
    client = server.client()
    for file in sorted(folder.iterdir()):
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.name}")


def download(server: S3Server, prefix: str, folder: Path) -> None:
    """Gets the files directly below a prefix of the bucket."""
    client = server.client()
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/", Delimiter="/")
    for found in listed["Contents"]:
        client.download_file(BUCKET, found["Key"], str(folder / Path(found["Key"]).name))


if __name__ == "__main__":
    main()
