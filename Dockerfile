# syntax=docker/dockerfile:1
# The one image that everything runs in on Vertex AI and Kubeflow: the pipeline's steps, the training job, Dataflow's workers and
# the server. TFX 1.21 on Debian 13, as a user without rights.
#
#   docker build -t tfx-vision .                             runs everything on CPUs
#   docker build -t tfx-vision:gpu --target gpu .            with CUDA and cuDNN, for GPU machines; runs on CPUs as well
#   docker run --rm -v "$PWD:/data" tfx-vision python local_runner.py --data /data/photos --workspace /data/run
#   docker run --rm -v "$PWD:/data" -p 8501:8501 tfx-vision python -m models.server --model /data/run/serving_model --host 0.0.0.0

# What installs; g++ builds one package (pyfarmhash) and stays behind.
FROM python:3.11-slim-trixie AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv

FROM build AS cpu-packages
COPY requirements-tfx1.21.lock /requirements.lock
RUN awk '/^[a-z]/ {is_uv = /^uv==/} is_uv' /requirements.lock > /uv.lock \
    && /opt/venv/bin/python -m pip install --quiet --no-cache-dir --require-hashes --requirement /uv.lock \
    && /opt/venv/bin/uv pip sync --quiet --no-cache --python /opt/venv/bin/python --compile-bytecode --require-hashes /requirements.lock

FROM build AS gpu-packages
COPY requirements-tfx1.21-cuda.lock /requirements.lock
RUN awk '/^[a-z]/ {is_uv = /^uv==/} is_uv' /requirements.lock > /uv.lock \
    && /opt/venv/bin/python -m pip install --quiet --no-cache-dir --require-hashes --requirement /uv.lock \
    && /opt/venv/bin/uv pip sync --quiet --no-cache --python /opt/venv/bin/python --compile-bytecode --require-hashes /requirements.lock

# What starts a worker of Dataflow. The version is that of apache-beam in the lock.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM python:3.11-slim-trixie AS pipeline
COPY --from=beam /opt/apache/beam /opt/apache/beam
# oneDNN is off by default on processors without AVX-512, where it makes the network 2.5 times as fast. Beam would make an
# environment of its own, which has none of our packages.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app TF_ENABLE_ONEDNN_OPTS=1 TF_FORCE_GPU_ALLOW_GROWTH=true PYTHONUNBUFFERED=1 \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
WORKDIR /app
COPY local_runner.py kubeflow_runner.py LICENSE ./
COPY data data
COPY preprocessing preprocessing
COPY models models
COPY pipeline pipeline
RUN python -m compileall -q . && useradd --create-home --uid 1000 tfx && mkdir runs && chown tfx runs
USER tfx
# Dataflow gives its worker options only, such as --id=1; everybody else gives a command.
ENTRYPOINT ["/bin/sh", "-c", "case \"$1\" in --*) exec /opt/apache/beam/boot \"$@\" ;; *) exec \"$@\" ;; esac", "entrypoint"]
CMD ["python", "local_runner.py", "--help"]

FROM pipeline AS gpu
COPY --from=gpu-packages /opt/venv /opt/venv
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The one that a plain `docker build` makes.
FROM pipeline AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv
