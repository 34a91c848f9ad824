<?php
// PHP's PDO, as web applications use it: a connection for each request, foreign keys, exceptions.
//
//     pdo.php write DATABASE delete|wal    works with the database, prints what it holds
//     pdo.php read DATABASE delete|wal     prints what it holds, and must not be able to write

[, $mode, $path, $journal] = $argv;

function connect(): PDO
{
    global $path, $mode;
    // A write on a replica in WAL mode is refused as "database is locked", which is waited for.
    $options = [PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION, PDO::ATTR_TIMEOUT => $mode === 'write' ? 10 : 1];
    $pdo = new PDO("sqlite:$path", null, null, $options);
    $pdo->exec('PRAGMA foreign_keys = ON');
    return $pdo;
}

function summary(PDO $pdo): string
{
    $row = $pdo->query('select count(*), sum(length(body)), max(name) from post join author on author = author.id');
    return implode(' ', $row->fetch(PDO::FETCH_NUM));
}

function write(): string
{
    global $journal;
    connect()->query("PRAGMA journal_mode = $journal")->fetchAll();
    connect()->exec(
        'create table author(id integer primary key, name text unique);
         create table post(id integer primary key, author references author on delete cascade, body);
         create trigger shout after insert on author begin
           insert into post(author, body) values (new.id, upper(new.name)); end;'
    );
    foreach (['ann', 'bob', 'eve'] as $name) {
        $pdo = connect();
        $pdo->prepare('insert into author(name) values (?)')->execute([$name]);
        $pdo->beginTransaction();
        $insert = $pdo->prepare('insert into post(author, body) values (?, ?)');
        for ($i = 0; $i < 100; $i++) {
            $insert->execute([$pdo->query("select id from author where name = '$name'")->fetchColumn(), str_repeat('x', $i * 50)]);
        }
        $pdo->commit();
    }
    $pdo = connect();
    $pdo->beginTransaction();
    $pdo->exec('delete from author');
    $pdo->rollBack();
    $pdo->exec("delete from author where name = 'eve'");
    try {
        $pdo->exec("insert into author(name) values ('ann')");
        exit(1);
    } catch (PDOException $error) {
    }
    // Two connections: one reads row by row while the other writes.
    $reader = connect()->query('select id from post');
    $first = $reader->fetchColumn();
    if ($journal === 'wal') {
        $pdo->exec('update post set body = body || 1');
    }
    while ($reader->fetchColumn() !== false);
    $reader = null;
    $pdo->exec('update post set body = body || 2');
    return summary($pdo);
}

function read(): string
{
    $pdo = connect();
    $found = summary($pdo);
    try {
        $pdo->exec("insert into author(name) values ('refused')");
    } catch (PDOException $error) {
        echo 'refused: ', $error->getMessage(), "\n";
        return $found;
    }
    fwrite(STDERR, "a write on a replica was not refused\n");
    exit(1);
}

echo $mode === 'write' ? write() : read(), "\n";
