//! The polite stop: the database server's own SHUTDOWN, asked for over its unix socket.
//!
//! Each call is bounded by the connection's timeouts, but the connect of the client library is
//! not (a stopped server with a full backlog blocks it), so the caller runs this on a thread that
//! it can leave behind.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use mysql::prelude::Queryable;
use mysql::{Conn, OptsBuilder};

use crate::crypto::secret::SecretString;
use crate::error::{Context, Error, Kind, Result};

/// Whom to connect as. It needs SHUTDOWN and CONNECTION ADMIN (MySQL: SHUTDOWN, CONNECTION_ADMIN,
/// SYSTEM_VARIABLES_ADMIN) and PROCESS, and no right to any data.
#[derive(Debug, Default)]
pub struct Account {
    user: Option<String>,
    password: Option<SecretString>,
}

impl Account {
    /// `user` and `password` of the groups `[client]` and `[byokfs]`, the latter winning.
    pub fn read(option_file: &Path) -> Result<Account> {
        let cannot = || format!("cannot read fence.option_file {}", option_file.display());
        // A pipe would hold the stop of the server up.
        if !std::fs::metadata(option_file).context(cannot)?.is_file() {
            return Err(Error::new(Kind::Config, format!("{}: it is not a file", cannot())));
        }
        Account::parse(&std::fs::read_to_string(option_file).context(cannot)?)
    }

    /// What is wrong with the file, while nobody waits for what is in it.
    pub fn complaint(option_file: &Path) -> Option<String> {
        if let Err(error) = Account::read(option_file) {
            return Some(error.to_string());
        }
        let metadata = std::fs::metadata(option_file).ok()?;
        let private = metadata.mode() & 0o077 == 0 && metadata.uid() == 0;
        (!private).then(|| {
            let shown = option_file.display();
            format!(
                "fence.option_file {shown} is not root's alone, and who reads it can stop the \
                 server: chown it to root and chmod it to 0600"
            )
        })
    }

    fn parse(text: &str) -> Result<Account> {
        let mut user = [None, None];
        let mut password = [None, None];
        let mut group = None;
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                group = ["client", "byokfs"].iter().position(|known| *known == name.trim());
                continue;
            }
            let (Some(group), Some((key, value))) = (group, line.split_once('=')) else { continue };
            let value = unquote(value.trim());
            match key.trim() {
                "user" => user[group] = Some(value.to_owned()),
                "password" => password[group] = Some(value.to_owned()),
                _ => {}
            }
        }
        let [client, own] = user;
        let user = own.or(client);
        let [client, own] = password;
        let password = own.or(client).map(SecretString::from_string_wiping).transpose()?;
        Ok(Account { user, password })
    }
}

/// As the servers' own option files: one pair of quotes is taken off.
fn unquote(value: &str) -> &str {
    ['"', '\'']
        .iter()
        .find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote))
        .unwrap_or(value)
}

/// Stops new sessions, ends the others and asks for a clean shutdown. Returns once the server has
/// taken the request; it is still to end. `done` is told of each step and how it went.
pub fn shut_down(
    socket: &Path,
    account: &Account,
    timeout: Duration,
    done: impl Fn(&'static str, Result<(), String>),
) -> Result<()> {
    let failed = |what: &str, error: mysql::Error| Error::new(Kind::Io, format!("{what}: {error}"));
    let path = socket
        .to_str()
        .ok_or_else(|| Error::usage(format!("fence.socket {} is not UTF-8", socket.display())))?;
    let options = OptsBuilder::new()
        .socket(Some(path))
        .user(account.user.clone())
        .pass(account.password.as_ref().map(SecretString::expose))
        .read_timeout(Some(timeout))
        .write_timeout(Some(timeout))
        // Set, so that the library does not ask the server for it.
        .max_allowed_packet(Some(1 << 20))
        .prefer_socket(false);
    let mut conn = Conn::new(options).map_err(|error| failed("cannot connect", error))?;
    done("connect", Ok(()));

    // Both are best effort: SHUTDOWN alone is enough, they only make it sooner and cleaner.
    let (maria, own) = conn
        .query_first::<(String, u64), _>("SELECT VERSION(), CONNECTION_ID()")
        .map_err(|error| failed("cannot query", error))?
        .map_or((false, 0), |(version, id)| (version.contains("MariaDB"), id));
    // MariaDB has no offline_mode; 10 is the least it takes, administrators have one more.
    let closing =
        if maria { "SET GLOBAL max_connections = 10" } else { "SET GLOBAL offline_mode = ON" };
    done("refuse new sessions", conn.query_drop(closing).map_err(|error| error.to_string()));
    done("end sessions", end_sessions(&mut conn, own).map_err(|error| error.to_string()));

    match conn.query_drop("SHUTDOWN") {
        // The server may close the connection instead of answering.
        Ok(()) | Err(mysql::Error::IoError(_) | mysql::Error::CodecError(_)) => {
            done("SHUTDOWN", Ok(()));
            Ok(())
        }
        Err(error) => Err(failed("SHUTDOWN is refused", error)),
    }
}

fn end_sessions(conn: &mut Conn, own: u64) -> mysql::Result<()> {
    let others: Vec<u64> = conn.exec(
        "SELECT ID FROM information_schema.PROCESSLIST WHERE ID <> ? AND USER NOT IN \
         ('system user', 'event_scheduler', 'unauthenticated user')",
        (own,),
    )?;
    for id in others {
        // One that has just ended is no failure of the rest.
        if let Err(error) = conn.query_drop(format!("KILL CONNECTION {id}")) {
            log::debug!("session {id} of the database server: {error}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn option_files() {
        let account = Account::parse(
            "# c\n[mysqld]\nuser=mysql\n[client]\nuser = fence\npassword=\"s=e'c\"\n[byokfs]\nuser='b'\n",
        )
        .unwrap();
        assert_eq!(account.user.as_deref(), Some("b"));
        assert_eq!(account.password.unwrap().expose(), "s=e'c");
        assert!(Account::parse("[mysqld]\nuser=mysql\n").unwrap().user.is_none());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_before_it_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fence.cnf");
        let complaint = || Account::complaint(&path).unwrap_or_default();
        assert!(complaint().contains("cannot read fence.option_file"), "{}", complaint());
        std::fs::write(&path, "[client]\nuser=fence\n").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        mode(0o640);
        assert!(complaint().contains("not root's alone"), "{}", complaint());
        mode(0o600);
        if rustix::process::geteuid().is_root() {
            assert_eq!(complaint(), "");
        }
        std::fs::write(&path, b"\xff").unwrap();
        assert_ne!(complaint(), "");
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::from(0o600)).unwrap();
        assert!(complaint().contains("not a file"), "{}", complaint());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Account::read(Path::new("/nonexistent/fence.cnf")).unwrap_err();
        assert!(error.to_string().contains("fence.option_file /nonexistent/fence.cnf"));
    }
}
