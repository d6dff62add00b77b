# mergekit-ray on Debian's own Python, for podman, Docker and Kubernetes: docs/container.md.
#
#   podman build --tag mergekit-ray .                            torch for the CPU
#   podman build --tag mergekit-ray --build-arg TORCH=cuda .     torch with the CUDA libraries
#
# Everything is installed under /usr/local and not in a virtual environment: a login shell, which KubeRay can be told to
# start Ray with, finds it on PATH, and Ray makes the environments of jobs that ask for more packages on top of it instead
# of copying it.

ARG BASE=docker.io/library/debian:bookworm-slim

# ------------------------------------------------------------------------------------- what every stage and the image has

FROM ${BASE} AS python
# Versions up to the point from where on Debian changes them for security alone: those updates are wanted.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates=20* \
        python-is-python3=3.11.* \
        python3=3.11.* \
        tini=0.19.* \
        wget=1.21.* \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/debconf/*-old \
    # Nothing in here changes user.
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 merge \
    && useradd --no-log-init --uid 10001 --gid 10001 --create-home --shell /bin/bash merge

# ------------------------------------------------------------------------------------------------------- what installs

FROM python AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv=3.11.* \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip
# pip stands apart and installs for the system's Python, into trees that become layers: torch's changes least often.
ENV PATH=/opt/pip/bin:$PATH \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore

FROM build AS torch
ARG TORCH=cpu
# Where to take torch from instead of PyTorch's index (cpu) or PyPI (cuda).
ARG TORCH_INDEX=
COPY docker/requirements-${TORCH}.txt /requirements.txt
# The secrets are optional: a pip.conf (a mirror, its credentials) and the certificate authority that it may name.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    case "${TORCH}" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index=https://pypi.org/simple ;; \
        *) echo "TORCH=${TORCH}: one of cpu, cuda" >&2; exit 2 ;; \
    esac \
    && pip --python /usr/bin/python3 install --root /torch --no-deps --require-hashes \
        --index-url "${TORCH_INDEX:-${index}}" --requirement /requirements.txt

FROM build AS dependencies
COPY docker/requirements.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    pip --python /usr/bin/python3 install --root /dependencies --no-deps --require-hashes \
        --requirement /requirements.txt

FROM build AS package
COPY docker/requirements-build.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    pip install --no-deps --require-hashes --requirement /requirements.txt
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY mergekit_ray mergekit_ray
# By name, as an index would give it: pip would record a path, which is gone with this stage, as the package's origin.
RUN pip wheel --no-cache-dir --no-deps --no-index --no-build-isolation --wheel-dir /built . \
    && echo mergekit-ray > /requirements.txt \
    && pip --python /usr/bin/python3 install --no-cache-dir --root /package --no-deps --no-index --find-links /built \
        --requirement /requirements.txt

# ----------------------------------------------------------------------------------------------------------- the image

FROM python
COPY --from=torch /torch /
COPY --from=dependencies /dependencies /
COPY --from=package /package /

# NUMBA_CACHE_DIR: merge loops are compiled for the processor that they meet, at first use, so not here. The package's own
#   folder, where they would be kept, cannot be written to; /tmp can, even where all else is read-only.
# NVIDIA_DRIVER_CAPABILITIES: what the container toolkit passes in once a GPU is given to the container.
ENV LANG=C.UTF-8 \
    NUMBA_CACHE_DIR=/tmp/numba \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

# For any user, and for the file systems mounted on it that take over its mode.
RUN install --directory --mode=1777 /data
WORKDIR /data
# By number: Kubernetes' runAsNonRoot cannot tell for a name.
USER 10001:10001
ENTRYPOINT ["tini", "--"]
CMD ["merge", "--help"]

ARG BASE
ARG CREATED=
ARG REVISION=
ARG TORCH=cpu
ARG VERSION=
LABEL org.opencontainers.image.title="mergekit-ray" \
    org.opencontainers.image.description="Merges language-model checkpoints larger than any one machine, on a Ray cluster" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.version="${VERSION}" \
    mergekit-ray.torch="${TORCH}"
