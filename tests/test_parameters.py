"""What a person can get wrong is said in one sentence, before anything runs."""

import pytest
from make import NINTH

from lib import attention, parameters
from lib.errors import UsageError
from lib.paths import ROOT
from lib.study import plan

CELL = "\n".join(f"{name}: {line.type} = {line.default!r}  # help" for name, line in plan.known_parameters().items())


def resolve(injected="", cell=CELL):
    """As in a notebook: the parameters cell ran, then perhaps papermill's."""
    history, namespace = ["", cell], {}
    exec(cell, namespace)  # the test's own text, in the place of IPython
    if injected:
        history.append("# Parameters\n" + injected)
        exec(injected, namespace)
    return parameters.resolve([*history, "p = parameters.resolve(In, globals())"], namespace)


def test_defaults_make_a_run():
    p = resolve()
    assert (p.attention, p.layers, p.context) == ("sdpa", 4, 256)


def test_injected_values_count_and_whole_numbers_make_floats():
    p = resolve("attention = 'baseline'\nlearning_rate = 1\n")
    assert (p.attention, p.learning_rate) == ("baseline", 1.0)


def test_where_no_history_is_kept_the_cell_s_annotations_say_what_there_is():
    """As under nbval. Without history nothing is injected, so there are no names to check."""
    namespace = {}
    exec(CELL, namespace)
    assert vars(parameters.resolve([""], namespace)) == vars(resolve())
    with pytest.raises(UsageError, match="run the parameters cell"):
        parameters.resolve([""], {})


def test_a_second_run_in_the_same_kernel_reads_the_newest_cells():
    namespace, newer = {}, CELL.replace("seed: int = 0", "seed: int = 5")
    exec(CELL, namespace)
    exec(newer, namespace)
    history = ["", CELL, "# Parameters\nold_name = 1\n", "p = 1", newer]
    assert parameters.resolve(history, namespace).seed == 5


@pytest.mark.parametrize(
    ("injected", "said"),
    [
        ("attention = 'spda'", "Did you mean 'sdpa'?"),
        ("attention = 'softmax2000'", "known: baseline, sdpa"),
        ("atention = 'sdpa'", "there is no parameter 'atention'; did you mean 'attention'?"),
        ("stps_per_epoch = 3", "did you mean 'steps_per_epoch'?"),
        ("steps_per_epoch = 'many'", "steps_per_epoch must be int, not 'many'"),
        ("steps_per_epoch = 2.5", "steps_per_epoch must be int, not 2.5"),
        ("packing = 1", "packing must be bool or 'documents', not 1"),
        ("packing = 'document'", "packing must be bool or 'documents', not 'document'"),
        ("learning_rate = '1e-4'", "YAML reads 1e-4 as text, write 1.0e-04 with its point"),
        ("options = 'window=4'", "-y 'name: {window: 64}'"),
        ("heads = 7", "heads must divide width: 7 heads do not divide 128"),
        ("context = 1024", "context 1024 is longer than the model's 512 positions"),
        ("batch_size = 0", "batch_size must be at least 1, not 0"),
        ("validation_share = 1.0", "validation_share must be at least 0 and below 1"),
        ("learning_rate = 0.0", "learning_rate must be above 0"),
        ("schedule = 'linear'", "schedule must be one of cosine, constant, not 'linear'"),
        ("inference_contexts = [64, 500]", "500 tokens and 32 new ones must fit 512 positions"),
        ("options = {'window': 3}", "sdpa has no option 'window'; it has: none."),
        ("attention = 'gqa'\noptions = {'kv_heads': 'two'}", "kv_heads must divide heads: 'two'"),
        ("attention = 'mine.py'", "there is no attention file 'mine.py'"),
        ("seed = 18446744073709551616", "seed must be a number of at most 2**53, not one of 65 bits"),
        ("seed = -10**4000", "seed must be a number of at most 2**53, not one of 13288 bits"),
        ("learning_rate = 10**400", "learning_rate must be a number of at most 2**53"),
        ("learning_rate = float('inf')", "learning_rate must be a finite number, not inf"),
        ("weight_decay = float('nan')", "weight_decay must be a finite number, not nan"),
        ("inference_contexts = [64, 2**64]", "inference_contexts must be a number of at most 2**53"),
        ("options = {'a': [1, {'b': float('-inf')}]}", "options must be a finite number, not -inf"),
        (
            "attention = 'lib/published/linear.py'\npacking = 'documents'",
            "lib/published/linear.py cannot keep the documents of a row apart; use packing true or false",
        ),
    ],
)
def test_a_wrong_value_is_said_in_one_sentence(injected, said):
    with pytest.raises(UsageError) as error:
        resolve(injected)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value._render_traceback_() == [f"UsageError: {error.value}"]


def test_a_line_misspelt_in_the_cell_itself_is_noticed():
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        resolve(cell=CELL + "\nepoks = 3")


def test_refused_parameters_leave_no_older_ones_to_train_with():
    namespace = {"p": resolve()}
    exec(CELL.replace("seed: int = 0", "seed: int = -1"), namespace)
    with pytest.raises(UsageError, match="seed must be at least 0"):
        parameters.resolve(["", CELL], namespace)
    for use in (lambda p: p.attention, vars):
        with pytest.raises(UsageError, match="seed must be at least 0"):
            use(namespace["p"])


def test_a_option_that_its_variant_refuses_is_said(tmp_path):
    source = NINTH.replace("weight=0.5", "window=8").replace(
        "self.weight = layer_idx, weight", "window = layer_idx, window"
    )
    source = source.replace(
        "        self.c_attn,",
        "        if window < 1: raise ValueError('window must be at least 1')\n        self.c_attn,",
    )
    source = source.replace("self.weight", "0.5")
    (tmp_path / "windowed.py").write_text(source)
    attention = f"attention = {str(tmp_path / 'windowed.py')!r}\n"
    with pytest.raises(UsageError, match="window must be at least 1"):
        resolve(attention + "options = {'window': 0}")
    with pytest.raises(UsageError, match="did you mean 'window'"):
        resolve(attention + "options = {'windw': 4}")
    with pytest.raises(UsageError, match=r"option window must be int, not 2\.5"):
        resolve(attention + "options = {'window': 2.5}")
    assert resolve(attention + "options = {'window': 4}").options == {"window": 4}


def test_names_tell_runs_apart_and_settings_bring_them_together():
    first, second = vars(resolve()), vars(resolve("attention = 'baseline'\nseed = 3"))
    assert parameters.run_name(first).startswith("sdpa-seed0-")
    assert parameters.run_name(second).startswith("baseline-seed3-")
    assert parameters.setting(first) == parameters.setting(second) != parameters.setting(vars(resolve("epochs = 2")))
    assert parameters.display_name({"attention": "../my/ninth.py", "label": ""}) == "ninth"


def test_no_record_names_a_machine_s_folders(tmp_path):
    values = {"attention": str(tmp_path / "mine.py"), "dataset": "a/b.jsonl", "tokenizer": "/somewhere/gpt2"}
    found = parameters.portable(values)
    assert not any(value.startswith("/") for value in found.values())
    assert found["dataset"] == "a/b.jsonl" and (ROOT / found["attention"]).resolve() == tmp_path / "mine.py"


def test_the_parameters_of_every_notebook_are_checked():
    history = ['records_folder: str = "records/quick-cpu"  # where the records are', "from lib import record"]
    namespace = {"records_folder": "records/quick-cpu"}
    assert parameters.checked(history, namespace) == namespace
    with pytest.raises(UsageError, match="there is no parameter 'record_folder'; did you mean 'records_folder'"):
        parameters.checked([history[0], "# Parameters\nrecord_folder = 'mine'\n"], namespace)
    with pytest.raises(UsageError, match="records_folder must be str, not 5"):
        parameters.checked(history, {"records_folder": 5})


def without(member):
    """A variant that lacks a member of the contract."""
    return NINTH.replace(f"def {member}(", f"def another_{member}(").replace(f"    {member} = ", f"    no_{member} = ")


@pytest.mark.parametrize("member", ["paper", *parameters.MEMBERS])
def test_a_variant_that_lacks_a_member_is_refused_beforehand(member, tmp_path):
    (tmp_path / "mine.py").write_text(without(member))
    with pytest.raises(UsageError, match=f"has no (text )?`{member}.*lib/attention/__init__.py") as said:
        resolve(f"attention = {str(tmp_path / 'mine.py')!r}")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("was", "then", "said"),
    [
        (
            "[:, -T:].contiguous()), None",
            "[:, -T:].contiguous())",
            r"must return \(\(B, T, C\), None\), not Tensor: `return output, None`",
        ),
        ("[:, -T:].contiguous()), None", "[:, -T:].contiguous()), None, None", "not a tuple of 3"),
        ("[:, -T:].contiguous()), None", "[:, :1]), None", r"not \(1, 1, 128\) for \(1, 8, 128\)"),
        ("past_key_values=None, padding_mask=None, **_)", "past_key_values=None)", "cannot be called as `forward"),
        ("core_flops(self, context, dense=False)", "core_flops(self, context)", "cannot be called as `core_flops"),
        ("return 2 * self.c_attn.nf * context\n", "return self.nothing\n", "core_flops.* raises AttributeError"),
        ("return 2 * self.c_attn.nf * context * element_bytes", "return None", "cache_bytes.* must give a number"),
        ("def reference(self, hidden_states)", "def reference(self)", "cannot be called as `reference"),
    ],
)  # fmt: skip
def test_a_member_that_takes_or_gives_something_else_is_refused_beforehand(was, then, said, tmp_path):
    assert was in NINTH
    (tmp_path / "mine.py").write_text(NINTH.replace(was, then))
    with pytest.raises(UsageError, match=said):
        resolve(f"attention = {str(tmp_path / 'mine.py')!r}")


@pytest.mark.parametrize("name", [*attention.variants(), "lib/published/linear.py", "lib/published/lsh.py"])
def test_every_variant_keeps_the_contract(name):
    assert (
        resolve(f"attention = {name!r}\nlabel = {'' if name in attention.variants() else 'as published'!r}").attention
        == name
    )


@pytest.mark.parametrize("profile", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_may_be_given_whole_to_one_run_and_its_study_is_said_not_to_be_of_it(profile, capsys):
    """`papermill train.ipynb out/mla.ipynb -p attention mla -f ../params/paper.yaml`."""
    given = plan.read_yaml(profile)
    if "study" not in given:
        pytest.skip("of another notebook")
    namespace = {}
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items())
    for cell in (CELL, injected):
        exec(cell, namespace)
    history = ["", CELL, injected, "p = parameters.resolve(In, globals())"]
    found = parameters.checked(history, namespace, beside=("study",))
    assert found["layers"] == given.get("layers", found["layers"]) and "study" not in found
    assert capsys.readouterr().out.count("study: is for `python -m lib.study`") == 1
    with pytest.raises(UsageError, match="there is no parameter 'study'"):
        parameters.checked(history, namespace)
