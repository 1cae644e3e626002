//! Databases that can be taken away and given back: SQLite that another process holds, and a PostgreSQL of the test's own that is stopped or killed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, QueryableByName, RunQueryDsl, sql_query};
use futures_util::FutureExt;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use crate::support::machine::say;

pub struct Database {
    engine: Engine,
    /// As `DATABASE_URL` takes it.
    pub url: String,
}

enum Engine {
    Sqlite { dir: TempDir, lock: Option<SqliteConnection> },
    Postgres { cluster: Cluster, fault: Fault, stopped: Vec<Pid> },
}

/// What becomes of PostgreSQL.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGSTOP: connections stay, and nobody answers.
    Stopped,
    /// SIGKILL: nobody listens.
    Killed,
}

/// A PostgreSQL server of its own, which goes when this is dropped.
struct Cluster {
    dir: PathBuf,
    port: String,
}

impl Database {
    pub fn sqlite() -> Self {
        let dir = TempDir::new().expect("a directory");
        let url = format!("sqlite:{}", dir.path().join("test.db").display());
        Self { engine: Engine::Sqlite { dir, lock: None }, url }
    }

    /// `None`, with a line that says so, where there is no PostgreSQL; in CI that is a failure.
    pub fn postgres(fault: Fault) -> Option<Self> {
        if std::env::var("TEST_POSTGRES_URL").is_err() {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI must name a PostgreSQL server in TEST_POSTGRES_URL");
            say("skipped: a PostgreSQL that fails, as TEST_POSTGRES_URL is not set");
            return None;
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/postgres");
        let started = Command::new(script).output().expect("the script runs");
        let said = words(&started);
        let value = |name: &str| said.lines().find_map(|line| line.strip_prefix(&format!("export {name}="))).expect("as the script says").to_owned();
        let (url, dir) = (value("TEST_POSTGRES_URL"), PathBuf::from(value("TEST_POSTGRES_DIR")));
        let port = url.rsplit_once(':').and_then(|(_, rest)| rest.split_once('/')).expect("a port").0.to_owned();
        let cluster = Cluster { dir, port };
        cluster.commit_for_good();
        Some(Self { engine: Engine::Postgres { cluster, fault, stopped: Vec::new() }, url })
    }

    /// Starts a PostgreSQL that may be [`Fault::Killed`] anew, with more settings.
    pub fn restart_with(&mut self, settings: &str) {
        if let Engine::Postgres { cluster, .. } = &self.engine {
            cluster.set(settings);
        }
        self.take_away();
        self.give_back();
    }

    /// What PostgreSQL has logged.
    pub fn postgres_log(&self) -> String {
        let Engine::Postgres { cluster, .. } = &self.engine else { return String::new() };
        std::fs::read_to_string(cluster.dir.join("server.log")).expect("its log")
    }

    /// Nobody can write any more.
    pub fn take_away(&mut self) {
        match &mut self.engine {
            Engine::Sqlite { dir, lock } => {
                let mut connection = SqliteConnection::establish(&dir.path().join("test.db").to_string_lossy()).expect("SQLite opens");
                connection.batch_execute("PRAGMA busy_timeout = 20000; BEGIN EXCLUSIVE").expect("locked");
                *lock = Some(connection);
            }
            Engine::Postgres { cluster, fault, stopped } => {
                let processes = cluster.processes();
                let signal = if *fault == Fault::Stopped { Signal::STOP } else { Signal::KILL };
                for process in &processes {
                    // Some of them end by themselves when the first goes.
                    kill_process(*process, signal).ok();
                }
                *stopped = processes;
            }
        }
    }

    pub fn give_back(&mut self) {
        match &mut self.engine {
            Engine::Sqlite { lock, .. } => drop(lock.take().expect("locked")),
            Engine::Postgres { stopped, fault: Fault::Stopped, .. } => {
                for process in stopped.drain(..).rev() {
                    kill_process(process, Signal::CONT).expect("it stands still");
                }
            }
            Engine::Postgres { cluster, fault: Fault::Killed, .. } => cluster.start(),
        }
    }

    /// The rows of a query of one column, which it must name `text`, by a way around the server.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        match &self.engine {
            Engine::Sqlite { dir, .. } => {
                let mut connection = SqliteConnection::establish(&dir.path().join("test.db").to_string_lossy()).expect("SQLite opens");
                connection.batch_execute("PRAGMA busy_timeout = 20000").expect("a pragma");
                let lines: Vec<Line> = sql_query(sql).load(&mut connection).expect(sql);
                lines.into_iter().map(|line| line.text).collect()
            }
            Engine::Postgres { .. } => {
                let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await.expect("PostgreSQL answers");
                tokio::spawn(connection.map(drop));
                let row = |message: SimpleQueryMessage| match message {
                    SimpleQueryMessage::Row(row) => Some(row.get("text").expect("not null").to_owned()),
                    _ => None,
                };
                client.simple_query(sql).await.expect(sql).into_iter().filter_map(row).collect()
            }
        }
    }
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = diesel::sql_types::Text)]
    text: String,
}

impl Cluster {
    /// What it acknowledges is to survive a kill, as it does where it is not told otherwise.
    fn commit_for_good(&self) {
        self.set("synchronous_commit = on\n");
        kill_process(self.processes()[0], Signal::HUP).expect("it reads them again");
    }

    /// Adds to its settings.
    fn set(&self, more: &str) {
        let path = self.dir.join("data/postgresql.conf");
        let settings = std::fs::read_to_string(&path).expect("its settings");
        std::fs::write(&path, settings + more).expect("written");
    }

    /// The server and its children, the server first.
    fn processes(&self) -> Vec<Pid> {
        let file = std::fs::read_to_string(self.dir.join("data/postmaster.pid")).expect("it runs");
        let server: i32 = file.lines().next().and_then(|line| line.trim().parse().ok()).expect("a number");
        let parent = |pid: i32| -> Option<i32> {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
        };
        let entries = std::fs::read_dir("/proc").expect("Linux").flatten();
        let all = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let children = all.filter(|pid| parent(*pid) == Some(server));
        std::iter::once(server).chain(children).filter_map(Pid::from_raw).collect()
    }

    fn start(&self) {
        let find = "command -v pg_ctl || find /usr/lib/postgresql -path '*/bin/pg_ctl' | sort -V | tail -n 1";
        let pg_ctl = words(&Command::new("sh").args(["-c", find]).output().expect("a shell")).trim().to_owned();
        let (user, port) =
            (if rustix::process::geteuid().is_root() { &["runuser", "-u", "postgres", "--"][..] } else { &[] }, format!("-p {}", self.port));
        let mut words = user.iter().copied().chain([pg_ctl.as_str(), "-D", "data", "-l", "server.log", "-o", &port, "-w", "start"]);
        // What was killed may hold the port and the shared memory for a moment.
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words).current_dir(&self.dir);
        let started = (0..20).any(|_| command.output().expect("it runs").status.success());
        assert!(started, "{}", std::fs::read_to_string(self.dir.join("server.log")).unwrap_or_default());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.dir.join("data/postmaster.pid").exists() {
            for process in self.processes() {
                kill_process(process, Signal::CONT).ok();
            }
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/postgres");
        Command::new(script).arg("stop").arg(&self.dir).output().ok();
    }
}

fn words(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
