# The same app for a Ray cluster: head and workers run this image. Build at the top of the repository:
#   docker build -f docker/ray.Dockerfile -t sidestep-ray .
#   docker run -p 8000:8000 -v ./tasks:/tasks -v ./model:/model:ro -v ./serve.yaml:/serve.yaml:ro --shm-size 1g \
#     -e SIDESTEP_KEYS -e SIDESTEP_CHANGE_KEYS sidestep-ray
# That is a cluster of one. On Kubernetes KubeRay's RayService takes the image and the same config.
FROM python:3.12-slim

COPY pyproject.toml constraints.txt README.md LICENSE NOTICE /src/
COPY src /src/src
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[ray]' && rm -r /src
COPY docker/serve.yaml /serve.yaml

RUN useradd --create-home --uid 1000 sidestep
USER sidestep
ENV HF_HUB_OFFLINE=1
VOLUME /tasks
EXPOSE 8000 8265
CMD ["serve", "run", "/serve.yaml"]
