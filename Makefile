# Countersign's commands; `make` alone lists them. POSIX shell, and GNU make 3.81, which is what macOS has.

.DEFAULT_GOAL := help
.PHONY: help up down demo simulate chaos test bench check prepare postgres clean
.PHONY: up-compose up-local down-compose down-local demo-compose demo-local rust programs
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# The queries are checked against the data in .sqlx, whatever DATABASE_URL the environment holds.
export SQLX_OFFLINE := true

DEVKIT = "$(CARGO_TARGET_DIR)/debug/devkit"
IMAGES = countersign/api countersign/worker countersign/devkit

# Does a Docker engine answer, and is Compose there? DOCKER=no says no.
compose_works = [ "$(DOCKER)" != no ] && docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1
compose_runs = $(compose_works) && [ -n "$$(docker compose ps --all --quiet 2>/dev/null)" ]

help:
	@echo "Usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

up: ## Start the whole stack, through Docker Compose where an engine answers (DOCKER=no: without), and wait until it is ready
	@if $(compose_works); then $(MAKE) up-compose; else $(MAKE) up-local; fi

down: ## Stop the stack, however it was started; its data stays
	@if $(compose_runs); then $(MAKE) down-compose; [ ! -f .countersign/state.json ] || $(MAKE) down-local; else $(MAKE) down-local; fi

demo: ## Post the challenge's burst of 60 to the stack (REAL_TIME=1 or SPEED=N: restart it at that speed first)
	@if $(compose_runs); then $(MAKE) demo-compose; else $(MAKE) demo-local; fi

# Not `programs`: it needs neither Postgres nor the services.
simulate: rust ## Compare the scheduling policy with others and with a clairvoyant, by simulation; fails if a target is missed
	@$(CARGO) run --quiet --package devkit -- simulate

chaos: programs ## Break whatever can break, under load (SEED=N: those faults, MINUTES=N: so long); fails if a guarantee is broken
	@$(DEVKIT) chaos

test: programs ## Run every test
	$(CARGO) test --workspace

# Built as devkit itself builds them, so that nothing is compiled twice.
bench: postgres rust ## Measure, beside others, on this machine (ONLY="accept engine": just these; BENCH=--quick: a smoke test)
	$(CARGO) build --release --workspace --bins --features worker/bench
	@"$(CARGO_TARGET_DIR)/release/devkit" bench $(ONLY) $(BENCH)

check: postgres rust ## Run what CI runs: format, lints, the committed data of the queries, every test
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --quiet --workspace --no-deps
	@$(MAKE) programs
	$(DEVKIT) prepare --check
	@$(MAKE) test

# Not `programs`: the services do not compile without the data that this writes.
prepare: postgres rust ## Write the data of the queries in .sqlx anew, after a change to a query or a migration
	$(CARGO) run --package devkit -- prepare

postgres: ## Install what is needed beside Rust, where it is missing: PostgreSQL's programs and a C compiler
	@sh devkit/install-postgres.sh

clean: down ## Stop the stack, and remove its data and everything that was built
	@if $(compose_works); then docker compose --profile demo down --volumes && docker image rm --force $(IMAGES); fi
	@[ ! -x $(DEVKIT) ] || $(DEVKIT) down --data
	rm -rf .countersign
	@if command -v $(CARGO) >/dev/null; then $(CARGO) clean; fi

# The parts of the above.

# Time runs SPEED times as fast as in the challenge, as in `devkit up`. Containers whose settings changed are replaced.
up-compose:
	@speed=$${REAL_TIME:+1}; speed=$${speed:-$${SPEED:-10}}; \
	export UPSTREAM_RATE="$${UPSTREAM_RATE:-10/$$((60000 / speed))ms}"; \
	export OUTAGE="$${OUTAGE:-$$((60000 / speed))ms..$$((300000 / speed))ms}"; \
	docker compose up --build --detach --wait || { docker compose logs --tail 20; exit 1; }
	@api=http://127.0.0.1:$${API_PORT:-8000}; key=$${BOOTSTRAP_API_KEY:-cs_local_development_key}; \
	echo; \
	echo "  API             $$api"; \
	echo "  documentation   $$api/docs"; \
	echo "  worker          http://127.0.0.1:$${WORKER_PORT:-8001}/metrics"; \
	echo "  upstream        http://127.0.0.1:$${UPSTREAM_PORT:-9000}/_audit"; \
	echo "  traces          http://127.0.0.1:$${JAEGER_PORT:-16686}"; \
	echo "  API key         $$key"; \
	echo "  webhook secret  $${BOOTSTRAP_WEBHOOK_SECRET:-whsec_Y291bnRlcnNpZ24tbG9jYWwtZGV2LXNlY3JldA==}"; \
	echo "  logs            docker compose logs --follow"; \
	echo; \
	echo "  curl -i $$api/crypto/sign -H 'X-API-Key: $$key' -H 'Content-Type: application/json' -d '{\"message\":\"hello\"}'"; \
	echo

up-local: programs
	@$(DEVKIT) up

down-compose:
	@docker compose down

down-local:
	@if [ ! -d .countersign ]; then echo "nothing runs"; \
	elif [ -x $(DEVKIT) ]; then $(DEVKIT) down; \
	else $(CARGO) run --package devkit -- down; fi

# In the stack's network: the worker reaches the demo's receiver there, and no Rust is needed.
demo-compose:
	@if [ -n "$$REAL_TIME$$SPEED" ]; then $(MAKE) up-compose; fi
	@docker compose run --rm --use-aliases demo

demo-local: programs
	@if [ -n "$$REAL_TIME$$SPEED" ]; then $(DEVKIT) down && $(DEVKIT) up; fi
	@$(DEVKIT) demo

# All in one build, as the tests and `devkit up` want them, so that neither builds for minutes and says nothing.
programs: postgres rust
	$(CARGO) build --workspace --bins

rust:
	@command -v $(CARGO) >/dev/null || { echo "no $(CARGO) on PATH; install Rust as https://rustup.rs says" >&2; exit 1; }
