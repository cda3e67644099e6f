# swimg: see README.md. `make setup` installs the packages for building, `make setup-test` those for
# everything else (Debian; as root or with sudo). demo, test and the benchmarks run setup-test
# themselves.

PREFIX ?= /usr/local
DESTDIR ?=
BUILD := .build
SHELL := /bin/bash
# Finds the compiler, because other programs are named swift too.
TOOLCHAIN := Scripts/toolchain.sh
SWIFT := $(TOOLCHAIN) swift
# Tests access internals, which changes how everything is compiled, so they get their own folder.
TEST_BUILD := .build-test
TEST_FLAGS := -c release -Xswiftc -enable-testing --scratch-path $(TEST_BUILD)

# Linking the Swift and C++ runtimes statically and reducing the dynamic loader's work saves a
# quarter of the start time and 1.5 MiB of memory.
STATIC := $(BUILD)/static
LINK_FLAGS := --static-swift-stdlib -Xswiftc -use-ld=lld -Xlinker -L$(STATIC) \
	-Xlinker -z -Xlinker pack-relative-relocs -Xlinker --icf=all

COMPLETIONS := bash-completion/completions zsh/site-functions fish/vendor_completions.d

.PHONY: all setup setup-test build demo test deb side-by-side sequences conversions fuzz-images fuzz sanitize bench bench-nbd bench-latency bench-http bench-imageio microbench manual docs install fmt lint clean

# setup must finish before build starts.
.NOTPARALLEL:

all: build

setup:
	@Scripts/setup.sh build

setup-test:
	@Scripts/setup.sh test

build:
	@mkdir -p $(STATIC)
	@ln -sf "$$(clang -print-file-name=libstdc++.a)" $(STATIC)/libstdc++.a
	@ln -sf "$$(clang -print-file-name=libgcc_eh.a)" $(STATIC)/libgcc_s.a
	$(SWIFT) build -c release --product swimg $(LINK_FLAGS) --scratch-path $(BUILD)

# Converts a real disk image, judged by qemu-img.
demo: setup-test build
	@Scripts/demo.sh $(BUILD)/release/swimg

# Runs all tests, or those whose names match FILTER. Failures are repeated at the end, after
# thousands of lines of output.
FILTER ?=
test: setup-test
	$(SWIFT) build $(TEST_FLAGS) --build-tests
	@set -o pipefail; $(SWIFT) test $(TEST_FLAGS) --skip-build $(if $(FILTER),--filter '$(FILTER)') 2>&1 | tee $(TEST_BUILD)/log \
		|| { echo; grep -A 12 'recorded an issue' $(TEST_BUILD)/log; exit 1; }

# Compares all verbs with qemu-img on the fixtures and on random images, some of them damaged.
side-by-side: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Scripts/side-by-side.py $(BUILD)/release/swimg

# Runs random sequences of verbs on one image, by swimg and qemu-img in turns, and compares the image
# with a model after each; 2 seconds per sequence. `test` runs 6 of them. A failure tells how to see
# it again. `conversions` converts each random image 4 times, into new and existing targets.
SEED ?= 1
sequences: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Scripts/sequences.py $(BUILD)/release/swimg \
		--count $(or $(COUNT),2000) --seed $(SEED)

conversions: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Scripts/sequences.py $(BUILD)/release/swimg --conversions \
		--count $(or $(COUNT),500) --seed $(SEED)

# Reads, repairs and resizes images with changes to meaningful fields, about 6 per second; `test`
# runs 30 of them. A failure tells how to make its image again.
fuzz-images: setup-test
	$(SWIFT) build $(TEST_FLAGS) --build-tests
	@set -o pipefail; SWIMG_MUTATIONS=$(or $(COUNT),20000) SWIMG_SEED=$(SEED) \
		$(SWIFT) test $(TEST_FLAGS) --skip-build --filter MutationTests 2>&1 | tee $(TEST_BUILD)/fuzz-images.log

# Runs libFuzzer in memory on the header, the tables, and the whole disk before and after repairs
# and resizes: TIME seconds each, starting from the fixtures. Findings are kept in
# .build-fuzz/found; `.build-fuzz/release/FuzzImage FILE` reproduces one. A separate package. (gold
# cannot link it.)
TIME ?= 1200
FUZZ_BUILD := .build-fuzz
fuzz: setup
	$(SWIFT) build -c release --package-path Fuzz --scratch-path $(FUZZ_BUILD) \
		-Xswiftc -sanitize=fuzzer -Xswiftc -use-ld=lld
	@mkdir -p $(FUZZ_BUILD)/seeds $(FUZZ_BUILD)/found
	@cp Fixtures/images/*.qcow2 $(FUZZ_BUILD)/seeds
	@for image in Fixtures/images/*.gz; do \
		gunzip -c $$image > $(FUZZ_BUILD)/seeds/$$(basename $$image .gz); done
	@for target in FuzzHeader FuzzTables FuzzImage; do \
		mkdir -p $(FUZZ_BUILD)/corpus/$$target; \
		$(FUZZ_BUILD)/release/$$target -max_total_time=$(TIME) -timeout=20 -rss_limit_mb=1024 \
			-max_len=300000 -print_final_stats=1 -verbosity=0 -artifact_prefix=$(FUZZ_BUILD)/found/$$target- \
			$(FUZZ_BUILD)/corpus/$$target $(FUZZ_BUILD)/seeds || exit 1; \
	done

# Runs the unit tests with a check for memory errors. Not for races: the thread sanitizer does not
# see the slow path of Swift's Mutex on Linux and reports every contended one. Not for leaks: XCTest
# has its own.
sanitize: setup-test
	ASAN_OPTIONS=detect_leaks=0 $(SWIFT) test -c release -Xswiftc -enable-testing --sanitize=address --scratch-path .build-asan \
		--filter '(DiskImage|ImageStorage|ImageFormats|ImageConvert)Tests'

# Takes more than an hour; updates docs/BENCHMARKS.md and the chart. XFS and btrfs need root.
bench: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Benchmarks/bench.py $(BUILD)/release/swimg

# Compares with the best settings of the peers on storage with latency or little bandwidth.
bench-latency: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Benchmarks/latency.py $(BUILD)/release/swimg

# Compares copies between servers in memory; uses the disk of `bench`.
bench-nbd: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Benchmarks/nbd.py $(BUILD)/release/swimg

# Compares reading from an HTTP server with curl, nbdkit and qemu-img; uses a part of the disk of
# `bench`.
bench-http: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Benchmarks/remote.py $(BUILD)/release/swimg

# Compares uploads to ovirt-imageio, and downloads, with its own client.
bench-imageio: setup-test build
	@PYTHONDONTWRITEBYTECODE=1 python3 Benchmarks/imageio_upload.py $(BUILD)/release/swimg

# Measures the steps of a conversion separately. A separate package, because it needs a library.
microbench: setup-test
	cd Benchmarks/Micro && ../../$(SWIFT) package benchmark --no-progress

# Generates the pages in Manual/ from the argument parser. Must run after options have changed.
manual: setup
	rm -f Manual/*.1
	$(SWIFT) package -c release --scratch-path .build-docs --allow-writing-to-package-directory \
		generate-manual --multi-page --output-directory Manual
	@rm Manual/swimg.help.1
	@cd Manual && for page in swimg.*.1; do \
		[ $$page = swimg.1 ] || mv $$page swimg-$${page#swimg.}; done

# Generates the documentation of the libraries in .build-docs/docs.
docs: setup
	@rm -rf .build-docs/symbols && mkdir -p .build-docs/symbols
	$(SWIFT) build --scratch-path .build-docs --target ImageConvert \
		-Xswiftc -emit-symbol-graph -Xswiftc -emit-symbol-graph-dir -Xswiftc $(CURDIR)/.build-docs/symbols
	$(TOOLCHAIN) docc convert Sources/ImageConvert/ImageConvert.docc --output-dir .build-docs/docs \
		--additional-symbol-graph-dir .build-docs/symbols --fallback-display-name ImageConvert \
		--fallback-bundle-identifier swimg.ImageConvert

# Installs one file that runs without Swift, its manual pages and the shell completions.
install: build
	install -D -s -m 755 $(BUILD)/release/swimg $(DESTDIR)$(PREFIX)/bin/swimg
	@echo "$(DESTDIR)$(PREFIX)/bin/swimg: $$(du -h $(DESTDIR)$(PREFIX)/bin/swimg | cut -f1)"
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 Manual/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(addprefix $(DESTDIR)$(PREFIX)/share/,$(COMPLETIONS))
	$(BUILD)/release/swimg --generate-completion-script bash \
		> $(DESTDIR)$(PREFIX)/share/bash-completion/completions/swimg
	$(BUILD)/release/swimg --generate-completion-script zsh \
		> $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_swimg
	$(BUILD)/release/swimg --generate-completion-script fish \
		> $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/swimg.fish

# Makes a Debian package of these files with its library dependencies: .build/deb/swimg_*.deb.
deb: build
	@Scripts/deb.sh $(BUILD)/deb

fmt:
	$(SWIFT) format --in-place --recursive Package.swift Sources Tests \
		Fuzz/Package.swift Fuzz/Sources

lint:
	$(SWIFT) format lint --strict --recursive Package.swift Sources Tests \
		Fuzz/Package.swift Fuzz/Sources

clean:
	rm -rf .build .build-test .build-asan .build-fuzz .build-docs demo
