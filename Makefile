.PHONY: quality style test slow docs ci

quality:  ## lint and type check, changing nothing
	ruff check .
	ruff format --check .
	mypy
	codespell README.md CHANGELOG.md CONTRIBUTING.md arp_hub arp_hub_cli benchmarks docs examples recipes tests

style:  ## let ruff fix what it can
	ruff check --fix .
	ruff format .

test:  ## the tests that CI runs
	pytest

slow:  ## the tests that take minutes
	pytest -m slow

docs:  ## the documentation, at http://127.0.0.1:8000
	mkdocs serve

ci:  ## everything in a fresh environment
	.ci/run
