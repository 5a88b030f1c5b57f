# SealFS. `make help` lists the targets.

# Where `make up` mounts and keeps its data: places of the system for root, of
# the home directory for everybody else.
ifeq ($(shell id -u),0)
MNT  ?= /mnt/sealfs
DATA ?= /var/lib/sealfs
else
MNT  ?= $(HOME)/sealfs
DATA ?= $(HOME)/.local/share/sealfs
endif
# The size of a new device image; without it the program's own default.
SIZE ?=

PREFIX  ?= /usr/local
DESTDIR ?=

FUZZTIME ?= 10s
ROUNDS   ?= 100
# How long `make soak-clean` works on a nearly full store.
SOAK     ?= 10m
# Where `make cluster` keeps everything, and the first port it takes (free ones without it).
CLUSTER      ?= /tmp/sealfs-cluster
CLUSTER_PORT ?=
# Of the simulator: one seed to replay, or how many to try.
SEED  ?=
SEEDS ?= 5000
# How long `make linear` checks histories.
LINEAR ?= 10m
# Of the power cuts: how many states, which mutants by name, or the one to replay.
STATES  ?= 400000
MUTANTS ?= .
REPLAY  ?=

PROGRAMS := sealfs mkfs.sealfs sealfs-fsck

# Go's own installer puts it where not every PATH looks.
GO ?= $(shell command -v go || echo /usr/local/go/bin/go)
export CGO_ENABLED := 0
TOOL := $(GO) tool -modfile=internal/devtools/go.mod
# The end-to-end tests use the programs of this build.
export SEALFS_BIN := $(CURDIR)/bin

.DEFAULT_GOAL := build
.PHONY: build up down cluster cluster-down test check e2e e2e-cluster sim linear crash dax-vm crash-device huge fuzz soak soak-clean bench bench-clean install uninstall clean help go

build: go ## build bin/sealfs, bin/mkfs.sealfs and bin/sealfs-fsck
	@$(GO) build -trimpath -o bin/ $(PROGRAMS:%=./cmd/%)

up: build ## format DATA if it is empty, start everything, mount at MNT [MNT= DATA= SIZE=]
	@bin/sealfs up --data '$(DATA)' --mount '$(MNT)' $(if $(SIZE),--size '$(SIZE)')

down: ## unmount and end everything that belongs to DATA [DATA=]
	@test -x bin/sealfs || $(MAKE) --no-print-directory build
	@bin/sealfs down --data '$(DATA)'

cluster: build ## 3 managers, 4 servers with 2 disks each and 2 mounts on loopback, under CLUSTER [CLUSTER= CLUSTER_PORT=]
	@bin/sealfs dev-cluster up --dir '$(CLUSTER)' $(if $(CLUSTER_PORT),--port $(CLUSTER_PORT))

cluster-down: ## unmount and end everything that belongs to CLUSTER; its data stay [CLUSTER=]
	@test -x bin/sealfs || $(MAKE) --no-print-directory build
	@bin/sealfs dev-cluster down --dir '$(CLUSTER)'

test: build ## build, and run all tests (a few minutes)
	@test -w /dev/fuse || echo 'note: /dev/fuse cannot be used here, so tests that mount are skipped'
	$(GO) test -timeout 9m ./...

# Packages without goroutines, and simulations in which they go one at a time: nothing to
# race. Of fsck, two tests bring its scanning goroutines to everything there is.
ALONE = alloc|cluster/placement|fsck|fsck/mend|internal/(crash|enc|lint|oracle)|lsfs/layout|meta|op|pmem/layout|txn

check: build ## formatting, vet, staticcheck, rules of the project, short tests under the race detector
	@unformatted=$$($$($(GO) env GOROOT)/bin/gofmt -l .); \
	  test -z "$$unformatted" || { echo "not formatted, run gofmt -w on:"; echo "$$unformatted"; exit 1; }
	$(GO) vet ./...
	$(TOOL) staticcheck -checks inherit,-ST1005 ./... # Raft is a name
	$(GO) test ./internal/lint
	@# Tests run programs; without the setting each sleeps a second at its end.
	@if command -v $${CC:-cc} >/dev/null; then set -x; GORACE=atexit_sleep_ms=0 CGO_ENABLED=1 $(GO) test -race -short -timeout 8m $$($(GO) list ./... | grep -vxE 'sealfs/($(ALONE))') && \
	  CGO_ENABLED=1 $(GO) test -race -short -timeout 5m ./fsck -run 'TestProblems$$|TestRotEverywhere'; \
	  else echo 'note: no C compiler, so the race detector is left out'; fi

e2e: build ## real programs on a real mount, and SIGKILL of everything ten times
	$(GO) test -count=1 -v -timeout 30m ./e2e -skip Cluster -full

e2e-cluster: build ## a cluster of real processes, on loopback and in network namespaces, while each is killed, paused and cut off
	$(GO) test -count=1 -v -timeout 40m ./e2e -run Cluster -full

sim: go ## the simulators of two-phase commit, of leases, and of both with sessions: SEEDS seeds each, or one that is replayed [SEED= SEEDS=5000]
	@$(GO) test -count=1 -v -timeout 24h ./txn ./lease ./internal/sim -run '^TestSimulate$$' -args $(if $(SEED),-seed $(SEED),-seeds $(SEEDS)) | \
	  awk '/^simulated:/ { split($$2, s, "="); split($$3, h, "="); split($$4, v, "="); seeds += s[2]; hours += h[2]; bad += v[2]; next } \
	    /^(--- )?FAIL/ { failed = 1 } { print } \
	    END { if (seeds) printf "sim: seeds=%d hours=%.1f violations=%d\n", seeds, hours, bad; exit failed }'

linear: build ## histories of mounts and library clients, for LINEAR, and on a cluster whose processes are killed, checked for linearizability [LINEAR=10m]
	@{ $(GO) test -count=1 -timeout 24h ./internal/linear -run Campaign -v -args -campaign $(LINEAR); $(GO) test -count=1 -timeout 1h ./e2e -run '^TestClusterLinear$$' -v -full; } | \
	  awk '/linear: histories=/ { if ($$1 == "linear:") { split($$2, h, "="); split($$3, o, "="); split($$4, v, "="); n += h[2]; ops += o[2]; bad += v[2]; next } } \
	    /^(--- )?FAIL/ { failed = 1 } { print } END { printf "linear: histories=%d operations=%d violations=%d\n", n, ops, bad; exit failed }'

crash: go ## cut the power at every write in every way, and sabotage the source in every way that must be found; or judge one state again [STATES= MUTANTS= REPLAY=]
	@mkdir -p bin; $(GO) test -c -o bin/crash.test ./internal/crash
	@$(if $(REPLAY),bin/crash.test -test.v -test.run '^TestReplay$$' -replay='$(REPLAY)',bin/crash.test -campaign -states=$(STATES) -mutants='$(MUTANTS)')

dax-vm: build ## a QEMU guest with persistent memory, its power cut ROUNDS times [ROUNDS=3 SEED=1 KERNEL=linux-image-….deb]
	$(GO) test -count=1 -v -timeout 4h ./internal/powercut -run DaxVM -args -dax-vm -rounds $(if $(filter command line environment,$(origin ROUNDS)),$(ROUNDS),3) -seed $(if $(SEED),$(SEED),1) $(if $(KERNEL),-kernel $(KERNEL))

huge: go ## one directory of FILES files from two mounts over four stores: creations, look-ups, reading [FILES=1000000]
	SEALFS_TEST_HUGE=$${FILES:-1000000} $(GO) test ./client -count=1 -v -timeout 2h -run 'TestHugeDirectory$$'

crash-device: build ## real programs on a device that logs its writes, replayed up to every flush [SEED=1]
	$(GO) test -count=1 -v -timeout 2h ./internal/powercut -run CrashDevice -args -crash-device -seed $(if $(SEED),$(SEED),1)

fuzz: go ## each fuzz target for FUZZTIME [FUZZTIME=10s]
	@set -e; for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n 1 dirname | sort -u); do \
	  for target in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$dir/*_test.go | cut -d' ' -f2); do \
	    echo "$$dir $$target"; \
	    $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$dir; \
	  done; done

soak: build ## SIGKILL of everything, ROUNDS times [ROUNDS=100]
	$(GO) test -count=1 -v -timeout 24h -run '^TestKill$$' ./e2e -full -rounds $(ROUNDS)

soak-clean: go ## a store that is 90 % full is overwritten, killed and verified for SOAK; what cleaning costs on a large device [SOAK=10m]
	$(GO) test -count=1 -v -timeout 24h -run 'SoakClean|CleanAmplification' ./server -args -soak $(SOAK) -clean-mb 2048

bench-clean: go ## what cleaning costs: amplification by load and utilisation, latencies beside an idle store
	$(GO) test -run '^$$' -bench Clean -benchtime 1x -timeout 30m ./server

bench: go ## micro-benchmarks; `bin/sealfs bench DIR` measures a mounted file system
	$(GO) test -run '^$$' -bench . -benchmem ./...

install: ## install the programs [PREFIX=/usr/local DESTDIR=]
	@for p in $(PROGRAMS); do test -x bin/$$p || exec $(MAKE) --no-print-directory build; done
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 $(PROGRAMS:%=bin/%) '$(DESTDIR)$(PREFIX)/bin'
	ln -sf sealfs-fsck '$(DESTDIR)$(PREFIX)/bin/fsck.sealfs'
	ln -sf sealfs '$(DESTDIR)$(PREFIX)/bin/mount.sealfs'
	@# mount(8) and fsck(8) look for their helpers in /sbin.
	@if test -z '$(DESTDIR)' && test -w /sbin; then set -x; \
	  ln -sf '$(PREFIX)/bin/sealfs-fsck' /sbin/fsck.sealfs; ln -sf '$(PREFIX)/bin/sealfs' /sbin/mount.sealfs; fi

uninstall: ## remove the installed programs [PREFIX= DESTDIR=]
	rm -f $(PROGRAMS:%='$(DESTDIR)$(PREFIX)/bin/%') '$(DESTDIR)$(PREFIX)/bin/fsck.sealfs' '$(DESTDIR)$(PREFIX)/bin/mount.sealfs'
	@if test -z '$(DESTDIR)' && test -w /sbin; then set -x; rm -f /sbin/fsck.sealfs /sbin/mount.sealfs; fi

clean: ## remove what was built; data directories are left alone
	rm -rf bin

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16
	@echo; echo '  defaults: MNT=$(MNT) DATA=$(DATA)'

# Before anything is built: is this Go new enough? A newer `go` may fetch the
# toolchain that go.mod asks for; an old one, such as Debian 12's, knows no such thing.
go:
	@want=$$(sed -n 's/^go //p' go.mod); \
	if ! command -v $(GO) >/dev/null; then \
	  echo "SealFS needs Go $$want or newer, and there is no Go here: install it from https://go.dev/dl/, or set GO=/path/to/go" >&2; exit 1; fi; \
	have=$$($(GO) env GOVERSION 2>/dev/null || (cd / && GOTOOLCHAIN=local $(GO) env GOVERSION)); \
	number=$$(echo "$$have" | grep -o '[0-9][0-9.]*' | head -n 1); \
	if [ "$$(printf '%s\n%s\n' "$$want" "$$number" | sort -V | head -n 1)" != "$$want" ]; then \
	  echo "SealFS needs Go $$want or newer; $$(command -v $(GO)) is $$have: install a newer one from https://go.dev/dl/, or set GO=/path/to/go" >&2; exit 1; fi
