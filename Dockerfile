# litefs as one static program.
#
#   docker build -t litefs .                      the image below: litefs alone, on Alpine
#   docker build -t litefs-binary --target binary .   nothing but the program
#
# Into the image of an application, whatever it is based on:
#
#   COPY --from=litefs-binary /usr/local/bin/litefs /usr/local/bin/litefs
#   COPY litefs.yml /etc/litefs.yml
#   ENTRYPOINT ["litefs", "mount"]
#
# The container needs the device and the right to mount, and the data directory on a volume.
# More in "In a container" in docs/operations.md.
#
#   docker run --device /dev/fuse --cap-add SYS_ADMIN --cap-add LINUX_IMMUTABLE --security-opt apparmor=unconfined \
#     -v "$PWD/litefs.yml:/etc/litefs.yml:ro" -v litefs-data:/var/lib/litefs --stop-timeout 60 ...

# Alpine's compiler makes programs for musl, which are static. rust-version in Cargo.toml is the oldest.
FROM rust:1.89-alpine3.22 AS build
# What the bundled SQLite and the crypto library are compiled with.
# hadolint ignore=DL3018
RUN apk add --no-cache musl-dev
WORKDIR /src
COPY . .
ARG LITEFS_COMMIT
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    LITEFS_COMMIT="$LITEFS_COMMIT" cargo build --release --locked --bin litefs \
    && cp target/release/litefs /litefs

FROM scratch AS binary
COPY --from=build /litefs /usr/local/bin/litefs

FROM alpine:3.22
# For people who look into the container; litefs itself needs neither.
# hadolint ignore=DL3018
RUN apk add --no-cache ca-certificates sqlite
COPY --from=binary /usr/local/bin/litefs /usr/local/bin/litefs
VOLUME /var/lib/litefs
EXPOSE 20202
HEALTHCHECK --interval=10s --timeout=5s CMD ["litefs", "status"]
ENTRYPOINT ["litefs"]
CMD ["mount"]
