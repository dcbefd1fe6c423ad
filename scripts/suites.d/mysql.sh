# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# MySQL 9 and MariaDB on the mount: create, DDL of every kind, kill -9, recover, compare. MySQL is fetched once, where a
# Debian mirror answers.

suite_mysql() {
    local dir=$1
    need_packages mariadb-server mariadb-client
    box_up "$dir/box"
    server_suite "$dir" mariadb
    mysql_up "$dir"
    [[ -z $mysql_prefix ]] || server_suite "$dir" mysql "$mysql_prefix"
    no_integrity_failure "$dir/box"
}

# server_suite DIR mariadb|mysql [PREFIX]
server_suite() {
    local dir=$1 kind=$2 data=$mnt/$2
    server_kind=$kind server_prefix=${3:-} server_sockets=$dir/$kind server_data=$data server_log=$dir/$kind.log
    : >"$server_log" && chmod 666 "$server_log"
    install -d -o mysql -g mysql -m 700 "$data" "$server_sockets"
    # A place for the keyring outside of the data, as a server with its own encryption has it.
    install -d -o mysql -g mysql -m 700 "$server_sockets/keyring"
    server_create
    on_exit server_stop
    server_start
    say "$kind: $(server_sql -e 'SELECT VERSION()')"
    server_ddl
    server_crash "$dir"
    server_stop
    # Once more from a clean end.
    server_start
    server_check
    server_stop
    say "$kind: DDL, kill -9, recovery and checks: ok"
}

# As the server's user, with temporary files of its own.
server_run() {
    setpriv --reuid=mysql --regid=mysql --clear-groups -- env HOME=/nonexistent USER=mysql TMPDIR="$server_sockets" "$@"
}

server_create() {
    local log=$server_log
    if [[ $server_kind == mariadb ]]; then
        mariadb_create "$server_data" "$server_sockets" "$log"
        return
    fi
    if ! server_run "$server_prefix/bin/mysqld" --datadir="$server_data" --log-error="$log" --initialize-insecure </dev/null >>"$log" 2>&1; then
        tail -n 20 "$log"
        return 1
    fi
    echo '{"components": "file://component_keyring_file"}' >"$server_data/mysqld.my"
    echo "{\"path\": \"$server_sockets/keyring/keys\", \"read_only\": false}" >"$server_data/component_keyring_file.cnf"
}

server_start() {
    local options=(--datadir="$server_data" --socket="$server_sockets/s" --pid-file="$server_sockets/pid" --log-error="$server_log"
        --skip-networking --innodb-buffer-pool-size=64M --log-bin="$server_data/binlog" --server-id=1)
    if [[ $server_kind == mariadb ]]; then
        # Its own encryption too, by a key file.
        echo "1;$(printf '%064d' 7)" >"$server_sockets/keyring/keys"
        detached "$server_log" setpriv --reuid=mysql --regid=mysql --clear-groups -- env TMPDIR="$server_sockets" mariadbd --no-defaults "${options[@]}" \
            --plugin-load-add=file_key_management --file-key-management-filename="$server_sockets/keyring/keys" \
            --innodb-flush-method=O_DIRECT >"$server_sockets/launched"
    else
        detached "$server_log" setpriv --reuid=mysql --regid=mysql --clear-groups -- env TMPDIR="$server_sockets" "$server_prefix/bin/mysqld" "${options[@]}" \
            >"$server_sockets/launched"
    fi
    server_pid=$(cat "$server_sockets/launched")
    wait_until 90 server_answers_or_dead || true
    server_answers || { tail -n 30 "$server_log" && return 1; }
}

server_sql() {
    if [[ $server_kind == mariadb ]]; then
        mariadb --no-defaults --user=root --socket="$server_sockets/s" --skip-column-names --batch "$@"
    else
        "$server_prefix/bin/mysql" --no-defaults --user=root --socket="$server_sockets/s" --skip-column-names --batch "$@"
    fi
}
server_answers() { server_sql -e 'SELECT 1' >/dev/null 2>&1; }
server_answers_or_dead() { server_answers || dead "$server_pid"; }

server_stop() {
    dead "$server_pid" && return 0
    server_sql -e SHUTDOWN >/dev/null 2>&1 || kill "$server_pid" 2>/dev/null || true
    wait_until 60 dead "$server_pid" || kill -9 "$server_pid"
}

# One of each kind of DDL, with rows in all of them.
server_ddl() {
    server_sql <<'SQL' >/dev/null
CREATE DATABASE d; USE d;
CREATE TABLE plain (id INT PRIMARY KEY AUTO_INCREMENT, a VARCHAR(200), b BLOB, KEY (a)) ENGINE=InnoDB;
INSERT INTO plain (a, b) VALUES ('one', REPEAT('x', 20000)), ('two', REPEAT('y', 30000));
INSERT INTO plain (a, b) SELECT CONCAT(a, id), b FROM plain;
INSERT INTO plain (a, b) SELECT CONCAT(a, id), b FROM plain;
INSERT INTO plain (a, b) SELECT CONCAT(a, id), b FROM plain;
INSERT INTO plain (a, b) SELECT CONCAT(a, id), b FROM plain;
CREATE TABLE parts (id INT, d DATE) PARTITION BY RANGE (id) (PARTITION p0 VALUES LESS THAN (100), PARTITION p1 VALUES LESS THAN (200), PARTITION p2 VALUES LESS THAN MAXVALUE);
INSERT INTO parts VALUES (1, '2020-01-01'), (150, '2021-01-01'), (1000, '2022-01-01');
ALTER TABLE parts REORGANIZE PARTITION p2 INTO (PARTITION p2 VALUES LESS THAN (300), PARTITION p3 VALUES LESS THAN MAXVALUE);
ALTER TABLE parts TRUNCATE PARTITION p1;
ALTER TABLE parts DROP PARTITION p0;
ALTER TABLE parts ADD COLUMN extra INT DEFAULT 7, ALGORITHM=INPLACE;
CREATE TABLE texts (id INT PRIMARY KEY, body TEXT, FULLTEXT (body)) ENGINE=InnoDB;
INSERT INTO texts VALUES (1, 'the quick brown fox'), (2, 'a lazy dog'), (3, 'database encryption');
CREATE TABLE packed (id INT PRIMARY KEY, a TEXT) ENGINE=InnoDB ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=4;
INSERT INTO packed SELECT id, REPEAT(a, 50) FROM plain;
CREATE TABLE renamed_from (id INT); INSERT INTO renamed_from VALUES (1), (2);
RENAME TABLE renamed_from TO renamed_to;
CREATE TABLE truncated (id INT); INSERT INTO truncated VALUES (1); TRUNCATE truncated; INSERT INTO truncated VALUES (9);
CREATE TABLE dropped LIKE plain; INSERT INTO dropped SELECT * FROM plain; DROP TABLE dropped;
CREATE TABLE rebuilt (id INT PRIMARY KEY, a CHAR(100)); INSERT INTO rebuilt SELECT id, LEFT(a, 100) FROM plain;
ALTER TABLE rebuilt ADD INDEX (a), ALGORITHM=INPLACE; ALTER TABLE rebuilt FORCE; OPTIMIZE TABLE rebuilt;
ALTER TABLE rebuilt MODIFY a VARCHAR(150), ALGORITHM=COPY;
CREATE TABLE `name with / and ä` (id INT); INSERT INTO `name with / and ä` VALUES (5);
CREATE TEMPORARY TABLE temporary (id INT) ENGINE=InnoDB; INSERT INTO temporary SELECT id FROM plain;
CREATE VIEW v AS SELECT COUNT(*) AS n FROM plain;
CREATE TRIGGER t BEFORE INSERT ON truncated FOR EACH ROW SET NEW.id = NEW.id + 1;
CREATE TABLE parent (id INT PRIMARY KEY); CREATE TABLE child (id INT, FOREIGN KEY (id) REFERENCES parent (id) ON DELETE CASCADE);
INSERT INTO parent VALUES (1), (2); INSERT INTO child VALUES (1), (2); DELETE FROM parent WHERE id = 1;
CREATE TABLE spatial_one (g GEOMETRY NOT NULL, SPATIAL INDEX (g)); INSERT INTO spatial_one VALUES (ST_GeomFromText('POINT(1 2)'));
CREATE TABLE isam (id INT PRIMARY KEY, a TEXT, FULLTEXT (a)) ENGINE=MyISAM; INSERT INTO isam SELECT id, a FROM plain; OPTIMIZE TABLE isam;
SQL
    if [[ $server_kind == mariadb ]]; then
        server_sql d <<'SQL'
CREATE TABLE squeezed (id INT PRIMARY KEY, a TEXT) PAGE_COMPRESSED=1; INSERT INTO squeezed SELECT id, REPEAT(a, 100) FROM plain;
CREATE TABLE secret (id INT PRIMARY KEY, a TEXT) ENCRYPTED=YES ENCRYPTION_KEY_ID=1; INSERT INTO secret SELECT id, a FROM plain;
CREATE TABLE aria (id INT PRIMARY KEY, a TEXT) ENGINE=Aria TRANSACTIONAL=1; INSERT INTO aria SELECT id, a FROM plain;
CREATE SEQUENCE s; SELECT NEXTVAL(s);
SQL
    else
        server_sql d <<'SQL'
CREATE TABLE squeezed (id INT PRIMARY KEY, a TEXT) COMPRESSION='zlib'; INSERT INTO squeezed SELECT id, REPEAT(a, 100) FROM plain;
OPTIMIZE TABLE squeezed;
CREATE TABLESPACE general ADD DATAFILE 'general.ibd' ENGINE=InnoDB;
CREATE TABLE in_general (id INT PRIMARY KEY, a TEXT) TABLESPACE general; INSERT INTO in_general SELECT id, a FROM plain;
ALTER TABLESPACE general RENAME TO general_two;
ALTER TABLE rebuilt TABLESPACE general_two;
CREATE TABLE secret (id INT PRIMARY KEY, a TEXT) ENCRYPTION='Y'; INSERT INTO secret SELECT id, a FROM plain;
CREATE UNDO TABLESPACE more ADD DATAFILE 'more.ibu'; ALTER UNDO TABLESPACE more SET INACTIVE;
ALTER INSTANCE ROTATE INNODB MASTER KEY;
FLUSH LOGS; RESET BINARY LOGS AND GTIDS;
SQL
    fi >/dev/null
    # Parallel DDL, as several users' applications do it.
    local number writers=() writer
    for number in 1 2 3 4; do
        server_sql d -e "CREATE TABLE par$number (id INT); INSERT INTO par$number VALUES ($number); ALTER TABLE par$number ADD c INT, ALGORITHM=COPY;
            RENAME TABLE par$number TO q$number; TRUNCATE q$number; INSERT INTO q$number (id) VALUES ($number); CREATE INDEX i ON q$number (id);" &
        writers+=($!)
    done
    for writer in "${writers[@]}"; do wait "$writer" || { say "$server_kind: parallel DDL failed" && return 1; }; done
}

# Four clients write; the server is killed; what was acknowledged is there.
server_crash() { # DIR
    local number row writers=() missing
    server_sql d -e 'CREATE TABLE acknowledged (client INT, n INT, pad VARCHAR(500), PRIMARY KEY (client, n))'
    for number in 1 2 3 4; do
        (
            trap - EXIT
            for row in {1..100000}; do printf "INSERT INTO acknowledged VALUES (%d, %d, REPEAT('p', 500)); SELECT 'ack', %d, %d;\n" $number "$row" $number "$row"; done |
                server_sql d --unbuffered 2>/dev/null | grep --line-buffered '^ack' >"$1/$server_kind.ack.$number" || true
        ) &
        writers+=($!)
    done
    sleep 4
    kill -9 "$server_pid"
    wait_until 10 dead "$server_pid"
    wait "${writers[@]}" 2>/dev/null || true
    server_start
    server_sql d -e "SELECT 'ack', client, n FROM acknowledged" | sort >"$1/there"
    missing=$(cat "$1/$server_kind".ack.* | grep -P '^ack\t\d+\t\d+$' | sort | comm -23 - "$1/there" | wc -l)
    say "$server_kind: killed after $(cat "$1/$server_kind".ack.* | wc -l) acknowledged rows, $missing of them missing"
    ((missing == 0)) || return 1
    (($(wc -l <"$1/there") > 0)) || { say "no rows were written" && return 1; }
    server_check
}

server_check() {
    local tables bad
    tables=$(server_sql -e "SELECT CONCAT('\`', table_name, '\`') FROM information_schema.tables WHERE table_schema = 'd' AND table_type = 'BASE TABLE'" | paste -sd,)
    bad=$(server_sql d -e "CHECK TABLE $tables EXTENDED" | awk -F'\t' '$NF != "OK"')
    [[ -z $bad ]] || { say "$server_kind: $bad" && return 1; }
    [[ $(server_sql d -e "SELECT (SELECT COUNT(*) FROM plain), (SELECT COUNT(*) FROM parts), (SELECT id FROM texts WHERE MATCH (body) AGAINST ('encryption')),
        (SELECT COUNT(*) FROM packed), (SELECT COUNT(*) FROM renamed_to), (SELECT id FROM truncated), (SELECT id FROM \`name with / and ä\`), (SELECT n FROM v),
        (SELECT COUNT(*) FROM child), (SELECT COUNT(*) FROM isam), (SELECT COUNT(*) FROM squeezed), (SELECT COUNT(*) FROM secret), (SELECT SUM(id) FROM q3)") == \
    $'32\t1\t3\t32\t2\t9\t5\t32\t1\t32\t32\t32\t3' ]] || { say "$server_kind: rows differ" && return 1; }
}
