# The commands of this project. On a fresh Debian with a Rust toolchain each works as it is, but for `make tsan`, which
# wants a nightly Rust with rust-src, `make fuzz` (g++) and `make prove` (root, debootstrap, python3-venv, sqlite3).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# A crate of ours, and the network, as `cargo tree` prints them.
OURS := ^(litefs|fuse|ltx)
NETWORK := ^(tokio|hyper|fuser)

.PHONY: help run wordpress test test-transports check quick bench reads chaos torture soak tsan fuzz deny prove direction

help:
	@echo "make run    build, and mount a primary of its own on ./.run/mnt"
	@echo "make wordpress  a WordPress site on two nodes of this machine"
	@echo "make test   every test"
	@echo "make test-transports  the tests with a mount, over each transport, with passthrough and without"
	@echo "make check  format, lints, documentation, crate direction"
	@echo "make quick  unit and engine tests only"
	@echo "make bench  the numbers of docs/benchmarks.md"
	@echo "make reads  10,000 writes, each read through another node under lag"
	@echo "make chaos  ten minutes of three nodes with faults by chance"
	@echo "make torture  what docs/testing.md describes, for long"
	@echo "make soak   three nodes for MINUTES=60, and what they use in target/soak"
	@echo "make tsan   tests with a mount, the program under the thread sanitizer"
	@echo "make fuzz   each fuzz target for 60 s"
	@echo "make deny   licences and sources of the dependencies"
	@echo "make prove  the Dockerfile's steps, in a Debian root"

run:
	@.ci/packages build
	cargo build --release
	@cargo run --quiet --release -- mount -standalone

wordpress:
	@packaging/wordpress/try

# The tests switch FUSE over io_uring on where they can, for the whole machine; afterwards the switch
# is as it was.
SWITCH := /sys/module/fuse/parameters/enable_uring

# Minutes are the rule; whatever hangs must not hang for good.
TEST_MAX := 45m

test:
	@.ci/packages test
	@.ci/better-sqlite3 >/dev/null
	@before=$$(cat $(SWITCH) 2>/dev/null || true); \
	trap '[ "$$before" != N ] || echo N 2>/dev/null >$(SWITCH) || true' EXIT; \
	timeout --kill-after=30 $(TEST_MAX) cargo test --workspace

# What a test does not choose itself is chosen here; the crate fuse tries every combination by itself.
WITH_MOUNT := mount:: cluster:: model:: http:: proxy:: cli:: semantics:: apps::

test-transports:
	@.ci/packages test
	cargo test -p fuse
	for transport in uring dev; do for passthrough in auto off; do \
	  echo "== $$transport, passthrough $$passthrough"; \
	  LITEFS_TEST_TRANSPORT=$$transport LITEFS_TEST_PASSTHROUGH=$$passthrough \
	    cargo test --test main -- $(WITH_MOUNT); \
	done; done

check: direction
	@.ci/packages build
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

# fuse and ltx depend on no crate of ours, and ltx knows no network.
direction:
	@tree=$$(cargo tree -p fuse -e normal --prefix none); ! tail -n +2 <<<"$$tree" | grep -E "$(OURS) "
	@tree=$$(cargo tree -p ltx -e normal --prefix none); ! tail -n +2 <<<"$$tree" | grep -E "$(OURS) |$(NETWORK) "

quick:
	cargo test --workspace --lib
	cargo test --test main -- engine:: tidy::

# ROUNDS=5 SCALE=1 ONLY="wal reads" TRANSPORT=auto PASSTHROUGH=auto SESSION=same: see benches/numbers/main.rs.
# SQLite syncs with fdatasync, as distributions build it and as litefs syncs for it: with fsync the
# bare half would wait for a journal commit of the file system each time.
bench:
	@.ci/packages build
	LIBSQLITE3_FLAGS=-DHAVE_FDATASYNC cargo bench -p litefs --bench numbers

# As in `make test`, ten times as often; LITEFS_TEST_SEED=N for the lag of another run.
reads:
	@.ci/packages test
	LITEFS_TEST_READS=10000 cargo test --test main -- proxy::reads::who_writes --nocapture

# MINUTES=10, and LITEFS_TEST_SEED=N for the faults of another run.
MINUTES ?= 10

chaos:
	@.ci/packages test
	LITEFS_TEST_MINUTES=$(MINUTES) cargo test --test main -- cluster::random --nocapture

# The first for MINUTES=10; SQLite's own suite takes what it takes, half an hour for each kind of mount, and
# every file call takes hours.
torture:
	@.ci/packages test
	LITEFS_TEST_MINUTES=$(MINUTES) cargo test --test main -- model:: --nocapture
	LITEFS_TEST_TCL=all cargo test --test main -- tcl:: --nocapture --test-threads 1
	LITEFS_TEST_ALL=1 cargo test --test main -- torture:: --nocapture
	LITEFS_TEST_ORDERS=15000 cargo test -p litefs --lib -- orders:: --nocapture

# Nodes of this test may run longer than those of others.
soak: MINUTES = 60
soak:
	@.ci/packages test
	LITEFS_TEST_MINUTES=$(MINUTES) LITEFS_TEST_RUN_MAX=$$((60 * $(MINUTES) + 600)) \
	  LITEFS_TEST_DIR=$(CURDIR)/target/soak cargo test --test main -- cluster::soak --nocapture

# The program and a standard library built for the thread sanitizer, and tests that run that program. What it finds
# goes to target/tsan/reports, and is a failure. ONLY="mount::locks cluster::halt" for other tests.
TSAN := $(CURDIR)/target/tsan
TSAN_ONLY := mount::locks mount::modes mount::roles mount::table cluster::follow cluster::halt cluster::lease \
  cluster::readers

tsan: ONLY = $(TSAN_ONLY)
tsan:
	@.ci/packages test
	@library=$$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library && [ -d $$library/std ] || { \
	  echo "make tsan: no nightly Rust with its source here:" \
	    "rustup toolchain install nightly --component rust-src" >&2; exit 1; }
	host=$$(rustc +nightly -vV | sed -n 's/^host: //p'); \
	RUSTFLAGS=-Zsanitizer=thread CARGO_TARGET_DIR=$(TSAN) \
	  cargo +nightly build -Zbuild-std --target $$host --bin litefs; \
	cargo test --test main --no-run; \
	cc -O2 -Wall -Werror -shared -fPIC -o $(TSAN)/shim.so tests/tsan/shim.c -ldl; \
	rm -rf $(TSAN)/reports; mkdir $(TSAN)/reports; \
	LITEFS_TEST_PROGRAM=$(TSAN)/$$host/debug/litefs LITEFS_TEST_RUN_MAX=3000 LITEFS_TEST_WAIT_MAX=300 \
	  LD_PRELOAD=$(TSAN)/shim.so TSAN_OPTIONS="log_path=$(TSAN)/reports/of history_size=4" \
	  cargo test --test main -- $(ONLY) && failed=0 || failed=1; \
	cat $(TSAN)/reports/* 2>/dev/null && failed=1; exit $$failed

fuzz:
	@command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
	for dir in fuzz fuse/fuzz ltx/fuzz; do \
	  (cd $$dir && for target in $$(RUSTC_BOOTSTRAP=1 cargo fuzz list); do \
	    mkdir -p target/corpus/$$target; \
	    RUSTC_BOOTSTRAP=1 cargo fuzz run $$target target/corpus/$$target corpus/$$target -- \
	      -max_total_time=60; \
	  done); \
	done

deny:
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --all-features check

prove:
	@.ci/packages build
	packaging/prove
