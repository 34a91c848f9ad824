"""Python's sqlite3 module, with the settings that its users choose.

    python.py write DATABASE SETTINGS    works with the database, prints what it holds
    python.py read DATABASE SETTINGS     prints what it holds, and must not be able to write
"""

import sqlite3
import sys

# What frameworks set on each connection.
SETTINGS = {
    "default": [],
    "wal": ["journal_mode=WAL"],
    # Ruby on Rails since 7.1.
    "rails": [
        "foreign_keys=ON",
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "mmap_size=134217728",
        "journal_size_limit=67108864",
        "cache_size=2000",
    ],
    # What Litestream and many web frameworks in Go advise.
    "truncate": ["journal_mode=TRUNCATE", "synchronous=FULL", "mmap_size=134217728"],
}


def connect(path, settings, timeout=10):
    connection = sqlite3.connect(path, timeout=timeout)
    for pragma in SETTINGS[settings]:
        connection.execute("PRAGMA " + pragma).fetchall()
    return connection


def summary(connection):
    return connection.execute(
        "select count(*), sum(number), sum(length(data)), group_concat(distinct word) from t"
    ).fetchone()


def write(path, settings):
    one = connect(path, settings)
    one.execute("create table t(id integer primary key, number int, word text, data blob)")
    one.execute("create index words on t(word)")
    # The module begins a transaction before the first insert.
    one.executemany(
        "insert into t(number, word, data) values (?, ?, ?)",
        ((n, "many", bytes(100)) for n in range(1000)),
    )
    one.commit()
    one.execute("delete from t")
    one.rollback()
    with one:
        one.execute("insert into t(number, word, data) values (1, 'blob', ?)", (bytes(300_000),))
    try:
        with one:
            one.execute("insert into t(number, word) values (2, 'never')")
            raise KeyError
    except KeyError:
        pass
    one.execute("savepoint a")
    one.execute("insert into t(number, word) values (3, 'never')")
    one.execute("savepoint b")
    one.execute("insert into t(number, word) values (4, 'never')")
    one.execute("rollback to a")
    one.execute("insert into t(number, word) values (5, 'savepoint')")
    one.execute("release a")
    one.commit()

    # A second connection of the same process sees what the first one has committed.
    two = connect(path, settings)
    assert summary(two) == summary(one)
    for n in range(20):
        with (one, two)[n % 2] as turn:
            turn.execute("insert into t(number, word) values (?, 'turns')", (n,))
    one.isolation_level = None
    one.execute("vacuum")
    one.execute("begin immediate")
    one.execute("update t set number = number + 1 where word = 'turns'")
    one.execute("commit")
    found = summary(two)
    backup = sqlite3.connect(":memory:")
    two.backup(backup)
    assert summary(backup) == found
    two.close()
    one.close()
    return found


def read(path, settings):
    connection = connect(path, settings, timeout=0.2)
    found = summary(connection)
    try:
        with connection:
            connection.execute("insert into t(number, word) values (9, 'refused')")
    except sqlite3.OperationalError as error:
        print("refused:", error)
        return found
    sys.exit("a write on a replica was not refused")


def main():
    mode, path, settings = sys.argv[1:]
    print(*{"write": write, "read": read}[mode](path, settings))


main()
