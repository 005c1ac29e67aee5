# The server on a CPU: docker build --build-arg TORCH_INDEX=... -t dspark .
FROM python:3.12-slim AS build
RUN python -m venv /opt/dspark
ENV PATH=/opt/dspark/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# torch first: a layer that seldom changes. Without TORCH_INDEX, the address that pytorch.org gives
# for "Pip, CPU", it brings gigabytes of CUDA along. Without what it needs, for that index has few
# versions of it and not those of constraints.txt; these come with the rest.
ARG TORCH_INDEX
COPY constraints.txt ./
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY dspark ./dspark
RUN pip install -c constraints.txt ".[serve,json]"

FROM python:3.12-slim
COPY --from=build /opt/dspark /opt/dspark
# The user by number, by which Kubernetes can tell that it is not root; a cache that any may write,
# for --user takes another.
RUN useradd --uid 10001 --create-home dspark && install -d -m 1777 /cache
ENV PATH=/opt/dspark/bin:$PATH XDG_CACHE_HOME=/cache
USER 10001
EXPOSE 8000
# A process with number 1 ignores SIGTERM until it handles it, which the server does once its model
# is loaded; SIGINT ends it before, too.
STOPSIGNAL SIGINT
HEALTHCHECK --interval=30s --start-period=300s CMD ["python", "-c", \
    "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["dspark"]
CMD ["serve", "bundled", "--host", "0.0.0.0"]
