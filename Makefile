# Targets that load programs or make namespaces (test, test-long, test-interop, soak, demo, bench)
# need root: sudo make demo. They install missing dependencies.

ifndef GO
GO := $(shell scripts/find-go)
endif
ifneq ($(GO),)
export PATH := $(dir $(GO)):$(PATH):/usr/sbin:/sbin
endif
export GO

VERSION := $(shell cat VERSION)
COMMIT := $(shell git -c safe.directory='$(CURDIR)' describe --always --dirty --exclude='*' --abbrev=12 2>/dev/null)
# The version has the commit; go build would fail to find it if the checkout
# belongs to another user, as under sudo.
BUILD_FLAGS := -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)'

.PHONY: build
build: go ## make bin/xdpcast; no clang needed
	@scripts/setup
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o bin/xdpcast ./cmd/xdpcast
	@if [ -n "$$SUDO_UID" ]; then chown -R "$$SUDO_UID:$$SUDO_GID" bin; fi

.PHONY: check
check: go ## build, check the sources and run the tests that need no root, in under a minute
	scripts/check

.PHONY: test
test: go ## run the tests
	@scripts/setup --test
	scripts/test

.PHONY: test-long
test-long: go ## run the control loop's tests with the race detector, those that need the machine to themselves, and more random ones
	@scripts/setup --test
	scripts/test --long

.PHONY: soak
soak: go ## run the long forms of tests, and each fuzz target, in about an hour; SOAK=night: longer; SOAK=10s: short forms
	@scripts/setup --test --interop
	scripts/soak

.PHONY: test-interop
test-interop: go ## relay a video stream between ffmpeg and other programs, scrape with Prometheus, look with Chromium
	@scripts/setup --interop
	$(GO) test -tags interop -count=1 -parallel 12 -timeout 25m -v ./test/interop

.PHONY: test-kernels
test-kernels: go ## run the program and the tests that fit on Linux 6.1, 6.12 and 7 in virtual machines; no root needed
	@scripts/setup --kernels
	scripts/kernels/test

.PHONY: test-kernels-short
test-kernels-short: go ## prove in a few minutes that the relay lives there
	@scripts/setup --kernels
	scripts/kernels/test --short

.PHONY: test-arm64
test-arm64: go ## the same as test-kernels on an emulated arm64 machine with Linux 6.12
	@scripts/setup --kernels-arm64
	ARCH=arm64 scripts/kernels/test 6.12

.PHONY: demo
demo: build ## show the relay at work in network namespaces
	bin/xdpcast demo

# The bench leaves out what cannot be installed, and reports it.
BENCH := $(GO) run -buildvcs=false ./scripts/bench -xdpcast bin/xdpcast
BENCH_SETUP := scripts/setup --bench || scripts/setup
BENCH_OWNER := if [ -n "$$SUDO_UID" ]; then chown -R "$$SUDO_UID:$$SUDO_GID" bench; fi

.PHONY: bench
bench: build ## measure the relay beside what else there is, in under 25 minutes; writes bench/report
	@$(BENCH_SETUP)
	$(BENCH)
	@$(BENCH_OWNER)

.PHONY: bench-quick
bench-quick: build ## the core of it in under 3 minutes
	@$(BENCH_SETUP)
	$(BENCH) -quick
	@$(BENCH_OWNER)

.PHONY: bench-smoke
bench-smoke: build ## only prove that the bench and what it measures work; no figures
	@$(BENCH_SETUP)
	$(BENCH) -smoke

CHAOS := $(GO) run -buildvcs=false ./scripts/chaos -xdpcast bin/xdpcast

.PHONY: chaos
chaos: build ## disturb a relay under traffic, 20 times in each way, on each path, and count
	$(CHAOS) -path kernel -rate 500000
	$(CHAOS) -path afxdp -rate 0
	$(CHAOS) -path fanout -rate 0

.PHONY: chaos-clock
chaos-clock: go ## step the clock of a virtual machine under a relay, 20 times on each path
	@scripts/setup --kernels
	scripts/kernels/clock

.PHONY: chaos-smoke
chaos-smoke: build ## the same once, in about a minute
	$(CHAOS) -smoke -path kernel
	$(CHAOS) -smoke -path afxdp
	$(CHAOS) -smoke -path fanout

.PHONY: generate
generate: go ## make the BPF objects, docs/cli.md, the man page and the completions again
	@scripts/setup --dev
	scripts/generate
	$(GO) test ./cmd/xdpcast -count=1 -run '^Test(Reference|ManPage|FishCompletion)$$' -update

.PHONY: check-generated
check-generated: go ## fail if something generated is stale
	scripts/check-generated

.PHONY: lint
lint: go ## check the sources without running them
	@scripts/setup --dev
	scripts/lint

.PHONY: package
package: go ## make Debian and RPM packages in dist/
	scripts/package
	@if [ -n "$$SUDO_UID" ]; then chown -R "$$SUDO_UID:$$SUDO_GID" dist; fi

.PHONY: image
image: go ## make the container image in dist/, without a container engine
	scripts/image
	@if [ -n "$$SUDO_UID" ]; then chown -R "$$SUDO_UID:$$SUDO_GID" dist; fi

.PHONY: test-image
test-image: go ## run the container image, and check the files for Kubernetes
	@scripts/setup --image
	scripts/test-image

.PHONY: test-package
test-package: go ## install, upgrade, remove and purge the packages in a Debian root
	@scripts/setup --package
	scripts/test-package
	scripts/test-service

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' Makefile | column -t -s "$$(printf '\t')"

# go fails if there is no Go; scripts/find-go has printed what to do.
.PHONY: go
go:
	@test -n "$(GO)"
