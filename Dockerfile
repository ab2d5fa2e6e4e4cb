# The function's image: Nuclio's processor and Python wrapper, the runtime half of this repository, its weights.
# deploy.sh builds it; by hand:
#   docker build --build-arg NUCLIO_VERSION=1.13.0 --build-arg DEVICE=gpu --tag advcam-defects:gpu .
# On a CPU OpenVINO runs the networks. For weights that have no graph (*.onnx) add --build-arg ENGINE=torch.
# Other weights than the image's: mount their folder at /opt/nuclio/weights.

# Must equal the version of the Nuclio that CVAT runs (components/serverless/docker-compose.serverless.yml in
# CVAT's repository): processor, dashboard and nuctl speak to each other. 1.13.0 belongs to CVAT 2.15.
ARG NUCLIO_VERSION=1.13.0
ARG NUCLIO_ARCH=amd64
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM quay.io/nuclio/handler-builder-python-onbuild:${NUCLIO_VERSION}-${NUCLIO_ARCH} AS nuclio

FROM ${PYTHON_IMAGE} AS packages
# cpu: OpenVINO, or PyTorch without CUDA where ENGINE is torch; either is gigabytes smaller than gpu: PyTorch as it comes,
# with its own CUDA, so the base image is the same.
ARG DEVICE=cpu
# openvino or torch; if left out openvino on the CPU, and torch on the GPU, which has no other.
ARG ENGINE=
WORKDIR /build
COPY pyproject.toml constraints.txt ./
COPY --from=nuclio /home/nuclio/bin/py3.11-whl whl/
# Only what the runtime half asks for, not the package itself: that would bring the offline half along. The
# wrapper's msgpack comes from Nuclio's own wheels.
RUN case "${DEVICE}+${ENGINE}" in \
        cpu+ | cpu+openvino) extra=runtime-cpu index= ;; \
        cpu+torch) extra=runtime index=--extra-index-url=https://download.pytorch.org/whl/cpu ;; \
        gpu+ | gpu+torch) extra=runtime index= ;; \
        gpu+openvino) echo "ENGINE is 'openvino', which runs on the CPU, but DEVICE is 'gpu'; leave one out" >&2; exit 1 ;; \
        cpu+* | gpu+*) echo "ENGINE is '${ENGINE}', but must be openvino or torch" >&2; exit 1 ;; \
        *) echo "DEVICE is '${DEVICE}', but must be cpu or gpu" >&2; exit 1 ;; \
    esac \
    && python -c "import sys, tomllib; \
extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
print(*extras[sys.argv[1]], sep='\\n')" "${extra}" > requirements.txt \
    && pip install --no-cache-dir --prefix=/packages --constraint constraints.txt ${index} \
        --requirement requirements.txt \
    && pip install --no-cache-dir --prefix=/packages --no-index --find-links whl msgpack

# One readable copy of everything, whatever the checkout's file modes are: the function does not run as root.
FROM ${PYTHON_IMAGE} AS files
COPY --from=nuclio /home/nuclio/bin/processor /function/usr/local/bin/processor
COPY --from=nuclio /home/nuclio/bin/py /function/opt/nuclio/
COPY main.py model_handler.py /function/opt/nuclio/
COPY defectcam/*.py /function/opt/nuclio/defectcam/
# `defectcam doctor`, which is to run where the function does.
COPY defectcam/cvat/__init__.py defectcam/cvat/client.py defectcam/cvat/doctor.py defectcam/cvat/setup.py \
    defectcam/cvat/target.py /function/opt/nuclio/defectcam/cvat/
COPY weights/*.* /weights/
RUN chmod -R a+rX,go-w /function /weights

# Everything but the weights, which deploy.sh puts onto it: new ones onto the code that runs already.
FROM ${PYTHON_IMAGE} AS code
# What opencv-python asks of the system.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home nuclio
COPY --from=packages /packages /usr/local
COPY --from=files /function /
WORKDIR /opt/nuclio
# As in the function files, which say why.
ENV OMP_WAIT_POLICY=passive
# A number, since Kubernetes cannot tell of a name that it is not root.
USER 1000
# Without it nuctl would wait for a healthy container in vain. Loading PyTorch and weights from a cold disk may take
# minutes, and only after them a failure counts.
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8082/ready')"]
CMD ["processor"]

FROM code AS function
COPY --from=files /weights weights/
