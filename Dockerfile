# syntax=docker/dockerfile:1

# Every program comes from one build; --target chooses the image: api (the default), worker, or devkit (the simulated upstream).

FROM rust:1.95-bookworm AS builder
WORKDIR /src
# The queries are checked against the data in .sqlx: a build needs no database.
ENV SQLX_OFFLINE=true CARGO_TERM_COLOR=never
COPY . .
# The caches outlive the build, and are no part of a layer; so the programs are copied out of target/ in the same step.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --locked --release --package api --package worker --package devkit \
    && install -D --target-directory=/out target/release/api target/release/worker target/release/devkit

FROM debian:bookworm-slim AS runtime
# Certificates for the upstream and for receivers of webhooks; curl for health checks.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.title="Countersign" \
    org.opencontainers.image.description="A reliable front for an unreliable, rate-limited signing API" \
    org.opencontainers.image.licenses="MIT OR Apache-2.0"

# The simulated upstream, and the demonstration. For development only.
FROM runtime AS devkit
COPY --from=builder /out/devkit /usr/local/bin/
EXPOSE 9000
ENTRYPOINT ["devkit"]

# Calls the signing API and delivers webhooks. Port: health and metrics.
FROM runtime AS worker
COPY --from=builder /out/worker /usr/local/bin/
EXPOSE 8001
ENTRYPOINT ["worker"]

# The HTTP service; with arguments, its other commands, such as `keys create`.
FROM runtime AS api
COPY --from=builder /out/api /usr/local/bin/
EXPOSE 8000
ENTRYPOINT ["api"]
