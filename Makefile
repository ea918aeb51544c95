# What this project can do on a Debian machine with Rust. `make` alone lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
DESTDIR ?=
PREFIX ?= /usr/local
RELEASE := target/release
PEERS := target/peers/bin
POSIX := target/posix/bin

# A C compiler builds zstd's library; the rest is for guests: the emulator, the tools that make container trees.
PACKAGES_BUILD := gcc libc6-dev
# libFuzzer is C++.
PACKAGES_FUZZ := g++
# Servers that sources are tested against; without them those tests say SKIPPED.
PACKAGES_SOURCES := docker-registry apache2-utils
PACKAGES_GUEST := qemu-system-x86 debootstrap xz-utils zstd
# What tests call: kill, strace, Python for readers of images and archives that are not ours, makers of other file systems.
PACKAGES_TEST := procps python3 strace xfsprogs btrfs-progs
# What scrapes and checks our metrics.
PACKAGES_MONITORING := prometheus
# For building the peers that benchmarks compare with.
PACKAGES_PEERS := libcap-ng-dev libseccomp-dev pkg-config make perl cmake

# cargo-nextest runs tests side by side and sums them up in one place; plain cargo runs the same ones.
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)
ifeq ($(NEXTEST),yes)
RUN_TESTS = $(CARGO) nextest run
ONLY_IGNORED = --run-ignored only
SHOWN = --no-capture
else
RUN_TESTS = $(CARGO) test --no-fail-fast
ONLY_IGNORED = -- --ignored
SHOWN = --nocapture
endif

# Guests need root on the host: their trees have device nodes, their writable layers trusted attributes.
ifneq ($(shell id -u),0)
AS_ROOT := sudo
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := sudo -E
endif

.PHONY: help
help: ## List what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: build
build: packages-build ## Build rafsd and rafs, optimised, into target/release
	$(CARGO) build --release --bins

.PHONY: demo
demo: packages-build packages-guest ## Show a guest running a program from a lazily loaded image, against downloading it first
	$(CARGO) build --release --bins
	$(CARGO) build --release --package rafsd-guest --bin demo
	$(AS_ROOT) $(RELEASE)/demo

.PHONY: test
test: packages-build packages-fuzz packages-sources packages-guest ## Check formatting and lints and run all tests, with real guests (10 minutes on two cores)
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(RUN_TESTS) --workspace
	FUZZ_SECONDS='7 chains=30 messages=30' tests/fuzz/run

.PHONY: fuzz
fuzz: packages-build packages-fuzz ## Fuzz FUZZ_TARGETS (all), each for FUZZ_SECONDS (60) of processor time (docs/testing.md)
	tests/fuzz/run

.PHONY: test-faults
test-faults: packages-build ## Run the whole fault matrix of docs/reliability.md, and ten minutes of reads under a quota
	$(RUN_TESTS) --package rafsd-backend --test faults --test eviction $(ONLY_IGNORED)

.PHONY: test-guest-full
test-guest-full: packages-build packages-guest ## Run the long guest tests: a Debian userland, newer kernel, several queues
	$(RUN_TESTS) --package rafsd --test guest_lifecycle --test guest_kata --test guest_userland --test guest_rights $(ONLY_IGNORED) $(SHOWN)

.PHONY: test-long
test-long: packages-build packages-guest ## Send the device ten million random and hostile requests (half an hour)
	$(CARGO) test --release --package rafsd --test virtqueues -- --ignored --nocapture

.PHONY: test-posix
test-posix: packages-build packages-guest $(POSIX)/pjdfstest ## Run pjdfstest in two guests, on rafsd, virtiofsd (after make peers) and the host
	$(RUN_TESTS) --package rafsd --test guest_posix $(ONLY_IGNORED) $(SHOWN)

.PHONY: test-stress
test-stress: packages-build packages-guest $(POSIX)/fsx ## Run fsx, stress-ng, fio and locks of many processes in a guest, at length (an hour)
	$(RUN_TESTS) --package rafsd --test guest_stress $(ONLY_IGNORED) $(SHOWN)

$(POSIX)/%:
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) install --locked --root target/posix \
		--target $(shell rustc -vV | sed -n 's/^host: //p') $*

.PHONY: test-many
test-many: packages-build packages-guest ## Look a million files up, and compare with virtiofsd at length (after make peers)
	$(RUN_TESTS) --package rafsd --test daemon $(ONLY_IGNORED) -- million very_many

.PHONY: test-monitoring
test-monitoring: packages-build ## Check the alert rules and scrape the metrics with Prometheus
	tests/guest/packages $(PACKAGES_MONITORING)
	$(CARGO) test --package rafsd --test daemon monitoring

.PHONY: test-crowd
test-crowd: packages-build ## Let 64 clients of the API mount, unmount, ask and be killed for five minutes
	$(RUN_TESTS) --package rafsd --test daemon $(ONLY_IGNORED) -- sixty_four

.PHONY: soak
soak: packages-build packages-guest ## Let containers come and go in one sandbox for RAFSD_SOAK_MINUTES (10)
	$(CARGO) test --release --package rafsd --test guest_soak -- --ignored --nocapture

.PHONY: peers
peers: $(PEERS)/virtiofsd $(PEERS)/nydusd ## Build virtiofsd and nydusd, which benchmarks compare with, into target/peers

$(PEERS)/virtiofsd:
	tests/guest/packages $(PACKAGES_BUILD) $(PACKAGES_PEERS)
	$(CARGO) install --locked --root target/peers virtiofsd

$(PEERS)/nydusd:
	tests/guest/packages $(PACKAGES_BUILD) $(PACKAGES_PEERS)
	$(CARGO) install --locked --root target/peers nydus-rs --features virtiofs

$(PEERS)/s3s-fs:
	tests/guest/packages $(PACKAGES_BUILD)
	$(CARGO) install --locked --root target/peers s3s-fs --version 0.14.1 --features binary

.PHONY: test-s3
test-s3: packages-build $(PEERS)/s3s-fs ## Run the suite of sources against an S3 server that checks signatures
	$(RUN_TESTS) --package rafsd-backend --test sources s3

.PHONY: bench
bench: packages-build peers ## Measure rafsd against virtiofsd and nydusd (docs/performance.md)
	$(CARGO) build --release --bins --package rafsd --package rafsd-bench
	$(RELEASE)/rafsd-bench --peers $(PEERS)

.PHONY: bench-start
bench-start: packages-build packages-guest ## Measure starts in a guest: cold, with a recorded trace, warm (docs/performance.md)
	$(CARGO) test --release --package rafsd --test guest_start -- --ignored --nocapture

.PHONY: install
install: build ## Install rafsd and rafs, man pages and completions below PREFIX (/usr/local)
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/rafsd $(RELEASE)/rafs
	ln -sf rafs $(DESTDIR)$(PREFIX)/bin/nydus-overlayfs
	$(RELEASE)/rafs man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	for program in rafs rafsd; do $(RELEASE)/rafs completions bash --of $$program \
	    > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$program; done
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system kata/packaging/systemd/*

.PHONY: clean
clean: ## Remove all that was built, with the prepared guests
	$(AS_ROOT) rm -rf target/guest
	rm -rf target

.PHONY: packages
packages: packages-build packages-fuzz packages-sources packages-guest ## Install the Debian packages that building and testing need

.PHONY: packages-build
packages-build:
	@tests/guest/packages $(PACKAGES_BUILD)

.PHONY: packages-fuzz
packages-fuzz:
	@tests/guest/packages $(PACKAGES_FUZZ)

.PHONY: packages-sources
packages-sources:
	@tests/guest/packages $(PACKAGES_SOURCES)

.PHONY: packages-guest
packages-guest:
	@tests/guest/packages $(PACKAGES_GUEST) $(PACKAGES_TEST)
