"""Reading of interactions, the generator, and splits without leaks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import interactions
from experiments.errors import InputError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ROWS = ["u1\ta\t5\t30", "u2\tb\t1\t10", "u1\tb\t2\t10", "u2\ta\t3\t10.5", "u1\tc\t2\t10"]
# The items of u1 in order: b and c at the same time as in the file, then a.
SEQUENCES = {"u1": "bca", "u2": "ba"}


def write(folder, text, name="x.inter"):
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return str(folder)


def load(folder, **settings):
    return interactions.load("x", data_dir=folder, **settings)


def sequences(data):
    names = [data.item_ids[item] for item in data.items]
    spans = zip(data.user_ids, data.starts[:-1], data.starts[1:], strict=True)
    return {user: "".join(names[start:end]) for user, start, end in spans}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\N{ZERO WIDTH NO-BREAK SPACE}"])
def test_inter_files_are_read_in_order_of_time_then_of_the_file(tmp_path, newline, start):
    data = load(write(tmp_path, start + newline.join([HEADER, *ROWS]) + newline))
    assert sequences(data) == SEQUENCES
    assert data.num_users == 2
    assert data.num_items == 3


def test_columns_may_be_in_any_order_and_without_a_rating(tmp_path):
    rows = [row.split("\t") for row in ROWS]
    lines = ["timestamp:float\titem_id:token\tuser_id:token"]
    lines += ["\t".join([time, item, user]) for user, item, _, time in rows]
    assert sequences(load(write(tmp_path, "\n".join(lines)))) == SEQUENCES


def test_u_data_is_the_same_without_a_header(tmp_path):
    ids = {"u1": "1", "u2": "2", "a": "10", "b": "11", "c": str(10**30)}
    lines = ["\t".join(ids.get(cell, cell) for cell in row.split("\t")) for row in ROWS]
    data = load(write(tmp_path, "\n".join(lines), "u.data"))
    assert sequences(data) == {"1": f"11{10**30}10", "2": "1110"}
    assert data.items.max() == 2  # huge ids cost no memory


def test_a_row_that_is_repeated_counts_once_and_an_item_at_another_time_twice(tmp_path):
    again = [*ROWS, ROWS[0], "u2\tb\t1\t99"]
    assert sequences(load(write(tmp_path, "\n".join([HEADER, *again])))) == {
        "u1": "bca",
        "u2": "bab",
    }


def test_users_and_items_with_few_interactions_are_removed_until_none_is_left(tmp_path):
    rows = ["1 a", "1 b", "1 c", "2 a", "2 b", "3 a", "3 d", "4 d"]
    lines = ["\t".join([*row.split(), "1", str(time)]) for time, row in enumerate(rows)]
    folder = write(tmp_path, "\n".join([HEADER, *lines]))
    # c and user 4 go first, then d, and so user 3.
    assert sequences(load(folder, min_interactions=2)) == {"1": "ab", "2": "ab"}
    with pytest.raises(InputError, match="has the 9 interactions of --min_interactions"):
        load(folder, min_interactions=9)


DAMAGED = {
    "no header": ("\n".join(ROWS), "first line must name each of user_id:token"),
    "no timestamp": (HEADER.rpartition("\t")[0] + "\nu\ti\t1", "timestamp:float is not there once"),
    "other type": (HEADER.replace("item_id:token", "item_id:float"), "item_id:token is not there"),
    "twice": (HEADER + "\tuser_id:token", "user_id:token is not there once"),
    "empty": ("", "the first line must name"),
    "header only": (HEADER + "\n", "the file has no interactions"),
    "columns": (f"{HEADER}\nu\ti\t1", r"line 2: must have 4 columns .* got 3"),
    "blank line": (f"{HEADER}\nu\ti\t1\t1\n\nu\tj\t1\t1", r"line 3: must have 4 columns .* got 0"),
    "empty id": (f"{HEADER}\n\ti\t1\t1", "line 2: user_id must be some text, got ''"),
    "time": (f"{HEADER}\nu\ti\t1\tnoon", "line 2: timestamp must be a number, got 'noon'"),
    "nan": (f"{HEADER}\nu\ti\t1\tnan", "line 2: timestamp must be a number, got 'nan'"),
    "gz": (b"\x1f\x8b\x08\x00\xff\xfe", "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_inter_file_is_refused_in_one_line(tmp_path, case):
    text, message = DAMAGED[case]
    with pytest.raises(InputError, match=message) as error:
        load(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("-1\t2\t3\t4", "line 2: user_id must be a whole number from 0, got '-1'"),
        ("1\tx\t3\t4", "line 2: item_id must be a whole number from 0, got 'x'"),
        ("1\t2\t3", "line 2: must have 4 columns"),
        ("1\t2\t3\tinf", "line 2: timestamp must be a number"),
    ],
)
def test_a_damaged_u_data_is_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, f"1\t2\t3\t4\n{row}\n", "u.data"))


def test_the_folder_must_hold_one_file(tmp_path):
    with pytest.raises(InputError, match="must be a folder that can be read"):
        load(str(tmp_path / "none"))
    with pytest.raises(InputError, match="found neither"):
        load(str(tmp_path))
    write(tmp_path, HEADER, "a.inter")
    write(tmp_path, "", "u.data")
    with pytest.raises(InputError, match=r"found a\.inter, u\.data"):
        load(str(tmp_path))


def test_the_digest_is_of_the_content(tmp_path):
    text = "\n".join([HEADER, *ROWS])
    first = load(write(tmp_path, text)).sha256
    assert load(write(tmp_path, text.replace("30", "31"))).sha256 == first  # the same order
    assert load(write(tmp_path, text.replace("30", "3"))).sha256 != first
    assert load(write(tmp_path, text.replace("u1", "u3"))).sha256 != first


def of_lengths(lengths):
    items = np.arange(sum(lengths), dtype=np.int32)
    users, names = [str(u) for u in range(len(lengths))], [str(i) for i in range(len(items))]
    return interactions._interactions("x", items, lengths, users, names)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=25, max_size=40), st.integers(1, 6))
def test_nothing_that_is_to_be_found_is_trained_on_or_in_a_history(lengths, slots):
    data = of_lengths([*lengths, 9, 9, 9])
    owner = np.repeat(np.arange(data.num_users), np.diff(data.starts))
    for protocol in interactions.PROTOCOLS:
        try:
            split = interactions.split(data, protocol)
        except InputError:
            continue
        trained = {int(data.items[t]) for t in np.flatnonzero(split.seen)}
        history, mask = data.histories(split.train, slots)
        assert mask[:, -1].all()
        assert {*history[mask].tolist(), *data.items[split.train].tolist()} <= trained
        for held in (split.validation, split.test):
            history, mask = data.histories(held.ends, slots)
            for user, end, last, row, kept in zip(*held, history, mask, strict=True):
                targets = data.items[end:last]
                assert len(targets)
                assert not trained & set(targets.tolist())
                assert (owner[end:last] == user).all()
                # The newest items before the targets, in front of which is padding.
                before = data.items[data.starts[user] : end][-slots:]
                assert row[kept].tolist() == before.tolist()
                assert (np.diff(kept.astype(int)) >= 0).all()
        tested = np.concatenate([np.arange(*pair) for pair in zip(*split.test[1:], strict=True)])
        selected = [np.arange(*pair) for pair in zip(*split.validation[1:], strict=True)]
        assert not set(tested) & set(np.concatenate([*selected, []]))
        if protocol == "last_fifth":
            groups = [set(owner[split.seen]), set(split.validation.users), set(split.test.users)]
            assert len(set.union(*groups)) == sum(map(len, groups))


def test_the_last_item_is_the_test_and_the_one_before_it_the_validation():
    data = of_lengths([5, 2, 3, 1])
    split = interactions.split(data, "next_item")
    assert split.test.ends.tolist() == [4, 9]
    assert split.validation.ends.tolist() == [3, 8]
    assert split.train.tolist() == [1, 2, 6]  # short users train only
    assert np.flatnonzero(~split.seen).tolist() == [3, 4, 8, 9]


def test_the_last_fifth_of_unseen_users_is_to_be_found():
    data = of_lengths([10] * 20)
    split = interactions.split(data, "last_fifth")
    assert len(split.test.users) == len(split.validation.users) == 2
    assert (split.test.ends - data.starts[split.test.users] == 8).all()
    assert split.seen.sum() == 160
    assert len(split.train) == 144


def test_too_few_users_are_refused():
    for protocol in interactions.PROTOCOLS:
        with pytest.raises(InputError, match=f"too few items to .* with --protocol={protocol}"):
            interactions.split(of_lengths([1, 1]), protocol)


def test_generated_users_have_a_few_interests_and_no_item_twice():
    data = interactions.synthetic(num_users=200, num_items=300, num_clusters=10)
    again = interactions.synthetic(num_users=200, num_items=300, num_clusters=10)
    assert data.sha256 == again.sha256
    counts, firsts = [], 0
    for start, end in zip(data.starts[:-1], data.starts[1:], strict=True):
        items = data.items[start:end]
        assert len(set(items)) == len(items)
        assert 10 <= len(items) <= 30
        counts.append(len(set(data.clusters[items])))
        firsts += np.sum(items < 10)
    assert set(counts) == {2, 3, 4}
    assert firsts / len(data.items) > 0.1  # the most popular of 30 items of each cluster
    assert data.item_ids[12] == "2.1"  # cluster and rank


def test_clusters_must_hold_enough_items_for_a_user():
    with pytest.raises(InputError, match=r"must be at least 15 for each of the 10 clusters"):
        interactions.synthetic(num_users=10, num_items=149, num_clusters=10)


def test_the_generator_is_the_same_everywhere():
    data = interactions.synthetic(num_users=20, num_items=60, num_clusters=4)
    assert data.sha256.startswith("53f6146253d60ca6")
