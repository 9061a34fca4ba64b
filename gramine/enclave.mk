# What the Makefiles of tee_gpu, tee_only_llama and gramine share: they set PROGRAMS, and for each of them ROLE_<program>,
# PROGRAM_<program>, SCRIPT_<program> and PRODUCT_<program>, and include this file. docs/gramine.md explains the parameters.
HERE     := $(patsubst ./%,%,$(dir $(lastword $(MAKEFILE_LIST))))
TEMPLATE := $(HERE)enclave.manifest.template
# Older ones refuse keys of the manifest, or read them otherwise.
GRAMINE      := 1.9
INSTALLATION := https://gramine.readthedocs.io/en/stable/installation.html
# Which interpreter's packages go into the enclave: one with TSQP, its extra "serve" and a CPU build of torch.
PYTHON   ?= $(HERE)../.venv/bin/python
# All paths are relative to the directory where the manifest lies and the program is started: MRENCLAVE depends on them.
RUNTIME  ?= $(HERE)runtime
MODELS   ?= $(HERE)models

MODEL           ?= $(or $(LLAMA_MODEL_PATH),smollm2)
MODEL_NAME      ?= $(patsubst %.gguf,%,$(notdir $(patsubst %/,%,$(MODEL))))
# Of an encrypted mount: the key's name under /dev/attestation/keys. Its files are then in MODELS/encrypted/MODEL_NAME, put
# there by whoever has the key, and ENCLAVE_SIZE and MAX_THREADS must be given.
MODEL_KEY       ?=
# Who asks for that key when the enclave starts: Gramine's secret provisioning, of a server whose certificate this file's
# authority signed. Its address is SECRET_PROVISION_SERVERS.
PROVISION_CA    ?=
# The digest that the model must have; needed where it is encrypted, since trusted files are measured themselves.
MODEL_DIGEST    ?=
DTYPE           ?= float32
LEVEL           ?= masked
SERVES          ?= open
# Files NAME.key, relative to the Makefile's directory; their number is the number of workers and of dealers.
WORKER_KEYS     ?=
DEALER_KEYS     ?=
API_KEYS        ?=
# The enclave's own key for workers with an allow-list: a file NAME.key_secret, encrypted, and the name of the key that it is
# encrypted with under /dev/attestation/keys.
OWN_KEY         ?=
OWN_KEY_KEY     ?=
# 1: links without a key may leave this machine, in clear.
INSECURE        ?= 0
# Names under /dev/shm that workers on this machine made: shm:///dev/shm/NAME.
SHM             ?=
ATTESTATION     ?=
ARGS            ?=
THREADS         ?= 4
OMP_WAIT_POLICY ?= PASSIVE
EDMM            ?= 0
ISV_SVN         ?= 1
LOG_LEVEL       := $(if $(filter 1,$(DEBUG)),debug,error)
# Empty: Gramine's own place, ~/.config/gramine/enclave-key.pem.
SGX_SIGNER_KEY  ?=

# The size of an enclave and its threads, unless they are given, by tsqp size; worked out when a manifest is rendered.
ENCLAVE_SIZE    ?=
MAX_THREADS     ?=

ifneq ($(filter %_secret %.pem,$(WORKER_KEYS) $(DEALER_KEYS) $(API_KEYS)),)
$(error secret keys do not belong into a manifest: give the public NAME.key files, and a file of hashed API keys)
endif

ifneq ($(if $(OWN_KEY),1)$(if $(OWN_KEY_KEY),1),$(if $(and $(OWN_KEY),$(OWN_KEY_KEY)),11))
$(error an own key is read from an encrypted file only: give OWN_KEY and OWN_KEY_KEY, or neither)
endif

ifneq ($(and $(MODEL_KEY),$(if $(MODEL_DIGEST),,none)),)
$(error an encrypted model is not measured: give MODEL_DIGEST too, as tsqp pack prints it)
endif

ifneq ($(and $(PROVISION_CA),$(if $(MODEL_KEY),,none)),)
$(error PROVISION_CA is for the key of an encrypted model: give MODEL_KEY too, the name of that key)
endif

space := $(subst ,, )
# Which form of the model a program reads: the packed enclave part, or a Hugging Face directory.
plain  = $(if $(and $(filter serve,$(ROLE_$1)),$(filter masked verified,$(LEVEL))),packed,plain)
kind   = $(if $(MODEL_KEY),encrypted,$(call plain,$1))
model  = $(MODELS)/$(call kind,$1)/$(MODEL_NAME)
# The level at which tsqp size counts a program's memory.
level_of = $(if $(filter serve,$(ROLE_$1)),$(LEVEL),$(if $(filter runner,$(ROLE_$1)),open,local))

defines = '-Drole=$(ROLE_$1)' '-Dprogram=$(PROGRAM_$1)' '-Dscript=$(SCRIPT_$1)' '-Dargs=$(ARGS)' \
  '-Druntime=$(RUNTIME)' '-Dmodel=$(call model,$1)' '-Dmodel_name=$(MODEL_NAME)' '-Dmodel_key=$(MODEL_KEY)' '-Dmodel_digest=$(MODEL_DIGEST)' \
  '-Ddtype=$(DTYPE)' '-Dlevel=$(LEVEL)' '-Dserves=$(SERVES)' '-Dworker_keys=$(WORKER_KEYS)' \
  '-Ddealer_keys=$(DEALER_KEYS)' '-Dapi_keys=$(API_KEYS)' '-Dprovision_ca=$(PROVISION_CA)' '-Dinsecure=$(INSECURE)' \
  '-Down_key=$(OWN_KEY)' '-Down_key_key=$(OWN_KEY_KEY)' '-Dshm=$(SHM)' '-Dattestation=$(ATTESTATION)' \
  '-Dthreads=$(THREADS)' '-Domp_wait_policy=$(OMP_WAIT_POLICY)' '-Dedmm=$(EDMM)' '-Disvsvn=$(ISV_SVN)' \
  '-Disvprodid=$(PRODUCT_$1)' '-Dlog_level=$(LOG_LEVEL)'

.PHONY: all clean distclean need-gramine FORCE
.DELETE_ON_ERROR:
.SECONDARY:

all: $(PROGRAMS:%=%.manifest)
ifeq ($(SGX),1)
all: $(PROGRAMS:%=%.manifest.sgx)
endif

# Only what needs Gramine asks for it: everything else, such as make clean, works without.
need-gramine:
	@command -v gramine-manifest > /dev/null || { \
	  echo "Gramine is not installed: install the package gramine, $(GRAMINE) or later, as $(INSTALLATION) says." >&2; \
	  exit 1; }
	@found=$$(gramine-direct --version 2> /dev/null | grep -Eo '[0-9]+(\.[0-9]+)+' | head -n 1); \
	test "$$(printf '%s\n' "$${found:-0}" $(GRAMINE) | sort -V | head -n 1)" = $(GRAMINE) || { \
	  echo "Gramine $${found:-of an unknown version} is too old: this manifest needs $(GRAMINE) or later; upgrade the package gramine, as $(INSTALLATION) says." >&2; \
	  exit 1; }

# The interpreter and the packages that the enclave runs, in one directory and nothing else. Its mark lies beside it, since
# every file in it is measured.
$(RUNTIME).complete: $(HERE)runtime_tree.py $(HERE)../pyproject.toml $(shell find $(HERE)../src/tsqp -name '*.py' -o -name '*.so' -o -path '*/page/*')
	$(PYTHON) $(HERE)runtime_tree.py $(RUNTIME)
	@touch $@

$(MODELS)/plain/$(MODEL_NAME) $(MODELS)/packed/$(MODEL_NAME): $(if $(wildcard $(MODEL)),$(MODEL))
	$(PYTHON) $(HERE)model_files.py --kind $(notdir $(patsubst %/,%,$(dir $@))) --model '$(MODEL)' --out $@

# What a manifest was rendered with: another value renders it again.
.build/%.defines: FORCE
	@mkdir -p $(@D)
	@printf '%s\n' "$(call defines,$*) $(ENCLAVE_SIZE) $(MAX_THREADS)" > $@.part
	@cmp -s $@.part $@ && rm $@.part || mv $@.part $@

.build/%.size: .build/%.defines $(HERE)enclave_size.py
	@$(PYTHON) $(HERE)enclave_size.py --model '$(call model,$*)' --level $(call level_of,$*) --threads $(THREADS) \
	  --enclave-size '$(ENCLAVE_SIZE)' --max-threads '$(MAX_THREADS)' > $@.part
	@mv $@.part $@

# Rendered under another name: what fails leaves no manifest that looks complete.
define rules
$1.manifest: $(TEMPLATE) $(RUNTIME).complete $(call model,$1) $(SCRIPT_$1) .build/$1.size $(WORKER_KEYS) $(DEALER_KEYS) $(API_KEYS) $(PROVISION_CA) | need-gramine
	@gramine-manifest $$(call defines,$1) $$$$(cat .build/$1.size) $(TEMPLATE) $$@.part
	@mv $$@.part $$@
	@echo "$1.manifest: run it with gramine-direct ./$1"
endef
$(foreach program,$(PROGRAMS),$(eval $(call rules,$(program))))

# The date is fixed, so that the same key and files give the same signature.
%.manifest.sgx %.sig: %.manifest
	gramine-sgx-sign --manifest $< --output $*.manifest.sgx --date 0000-00-00 $(if $(SGX_SIGNER_KEY),--key '$(SGX_SIGNER_KEY)') > .build/$*.signed \
	  || { cat .build/$*.signed; echo "No enclave was signed. Is there a key? gramine-sgx-gen-private-key makes one." >&2; exit 1; }
	@printf '%s MRENCLAVE ' $*
	@gramine-sgx-sigstruct-view --output-format=json $*.sig | $(PYTHON) -c 'import json, sys; print(json.load(sys.stdin)["mr_enclave"])'

clean:
	rm -rf .build *.manifest *.manifest.sgx *.sig *.part

distclean: clean
	rm -rf $(RUNTIME) $(RUNTIME).complete $(MODELS)
