//! The server under test: its own process, directory, database and port.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diesel::Connection;
use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;
use live_meeting::livekit::webhook::sign;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::egress_peer::{EgressPeer, Refusal};
pub use super::http::{Response, parse_response, request};
use super::stalls::{Stalls, Wants};

pub const API_KEY: &str = "test-key";
pub const API_SECRET: &str = "a-livekit-secret-for-tests-0123456789";
pub const ADMIN_KEY: &str = "an-admin-key-for-tests";

const PROGRAM: &str = env!("CARGO_BIN_EXE_live-meeting");

/// How long a condition may take to come true before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the server is started. The environment of the test itself does not reach it.
pub struct Builder {
    env: BTreeMap<String, String>,
    args: Vec<String>,
    dir: Option<Arc<TempDir>>,
    /// Of another user, who runs the server.
    uid: Option<u32>,
    umask: Option<u32>,
    /// A program, with arguments, that becomes the server.
    by_way_of: Vec<&'static str>,
}

/// A running server. Dropping it kills it.
pub struct TestApp {
    pub addr: SocketAddr,
    pub dir: Arc<TempDir>,
    pub child: Child,
    log: Arc<Mutex<String>>,
    env: BTreeMap<String, String>,
    args: Vec<String>,
}

impl Builder {
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.to_owned(), value.into());
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    /// No ticket is asked for.
    pub fn open(self) -> Self {
        self.env("LIVE_MEETING__INGEST__AUTH", "open")
    }

    /// Uses the directory of an earlier server.
    pub fn dir(mut self, dir: &Arc<TempDir>) -> Self {
        self.dir = Some(Arc::clone(dir));
        self
    }

    /// As a user for whom permissions mean something: root's server becomes nobody's, with a directory of its own.
    pub fn unprivileged(mut self) -> Self {
        self.uid = rustix::process::geteuid().is_root().then_some(65_534);
        self
    }

    /// Started by a shell with this mask.
    pub fn umask(mut self, mask: u32) -> Self {
        self.umask = Some(mask);
        self
    }

    /// Started by another program that becomes the server, such as `prlimit`.
    pub fn by_way_of(mut self, program: &[&'static str]) -> Self {
        self.by_way_of = program.to_vec();
        self
    }

    pub async fn start(self) -> TestApp {
        let dir = self.dir.unwrap_or_else(|| Arc::new(TempDir::new().expect("a directory")));
        let command = match (self.uid, self.umask) {
            (Some(uid), _) => command_as(uid, dir.path(), &self.env),
            (None, Some(mask)) => {
                let mut command = command_of(Path::new("/bin/sh"), dir.path(), &self.env);
                command.args(["-c", &format!("umask {mask:03o}; exec \"$0\" \"$@\""), PROGRAM]);
                command
            }
            (None, None) => command(dir.path(), &self.env),
        };
        let (command, args) = match self.by_way_of.split_first() {
            Some((program, rest)) => {
                let arguments = rest.iter().map(|argument| (*argument).to_owned()).chain([PROGRAM.to_owned()]).chain(self.args);
                (command_of(Path::new(program), dir.path(), &self.env), arguments.collect())
            }
            None => (command, self.args),
        };
        start(command, dir, self.env, args).await
    }
}

/// The command, in a directory, with exactly this environment.
pub fn command(dir: &Path, env: &BTreeMap<String, String>) -> Command {
    command_of(Path::new(PROGRAM), dir, env)
}

/// The same as another user, who gets the directory and a copy of the program: the build may lie where that user cannot go.
fn command_as(uid: u32, dir: &Path, env: &BTreeMap<String, String>) -> Command {
    let program = dir.join("live-meeting");
    // Not copied by this process: a child that another test forks meanwhile would hold the copy open for writing, and it could not be run.
    let copied = std::process::Command::new("cp").arg(PROGRAM).arg(&program).status().expect("cp runs");
    assert!(copied.success(), "{copied}");
    std::os::unix::fs::chown(dir, Some(uid), None).expect("the directory changes hands");
    let mut command = command_of(&program, dir, env);
    command.uid(uid);
    command
}

fn command_of(program: &Path, dir: &Path, env: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).env_clear().envs(env).stdin(Stdio::null()).kill_on_drop(true);
    for inherited in ["PATH", "LLVM_PROFILE_FILE"] {
        if let Ok(value) = std::env::var(inherited) {
            command.env(inherited, value);
        }
    }
    command
}

/// What a command left behind.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the command to its end; fails after 60 s.
pub async fn run(dir: &Path, env: &[(&str, &str)], args: &[&str]) -> Finished {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let output = tokio::time::timeout(3 * PATIENCE, command(dir, &env).args(args).output()).await;
    let output = output.unwrap_or_else(|_| panic!("{args:?} does not end")).expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the command speaks UTF-8");
    Finished { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

async fn start(mut command: Command, dir: Arc<TempDir>, env: BTreeMap<String, String>, args: Vec<String>) -> TestApp {
    let mut child = command.args(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the server starts");
    let log = Arc::new(Mutex::new(String::new()));
    let (listening, mut address) = watch::channel(None);
    tokio::spawn(keep_log(child.stderr.take().expect("stderr is piped"), Arc::clone(&log), listening));
    let found = tokio::time::timeout(PATIENCE, address.wait_for(Option::is_some)).await;
    let addr = match found {
        Ok(Ok(addr)) => addr.expect("just waited for"),
        _ => panic!("the server does not listen:\n{}", log.lock().unwrap()),
    };
    TestApp { addr, dir, child, log, env, args }
}

async fn keep_log(stderr: impl AsyncRead + Unpin, log: Arc<Mutex<String>>, listening: watch::Sender<Option<SocketAddr>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((_, address)) = line.split_once("listening address=") {
            listening.send_replace(Some(address.trim().parse().expect("an address")));
        }
        let mut log = log.lock().unwrap();
        log.push_str(&line);
        log.push('\n');
    }
}

impl TestApp {
    pub fn builder() -> Builder {
        let env = [
            ("HOST", "127.0.0.1"),
            ("PORT", "0"),
            ("LIVEKIT_API_KEY", API_KEY),
            ("LIVEKIT_API_SECRET", API_SECRET),
            ("ADMIN_API_KEY", ADMIN_KEY),
            ("LIVE_MEETING__HTTP__WORKERS", "2"),
            // The disk of whoever runs the tests may be fuller than a server would like.
            ("LIVE_MEETING__STORAGE__MIN_FREE", "0"),
            ("RUST_BACKTRACE", "0"),
        ];
        Builder {
            env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            args: vec!["serve".to_owned()],
            dir: None,
            uid: None,
            umask: None,
            by_way_of: Vec::new(),
        }
    }

    /// Everything the server has logged.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn audio_dir(&self) -> PathBuf {
        audio_dir(&self.dir)
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("the server runs")
    }

    /// Every finished or growing recording, sorted by path.
    pub fn wav_files(&self) -> Vec<PathBuf> {
        wav_files(&self.audio_dir())
    }

    /// The only recording.
    #[track_caller]
    pub fn wav_file(&self) -> PathBuf {
        let files = self.wav_files();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    /// A connection of the test's own to the server's database: to look, and to be in the way with `BEGIN IMMEDIATE`, which its drop ends.
    pub fn database(&self) -> SqliteConnection {
        let path = self.dir.path().join("storage/live-meeting.db");
        let mut database = SqliteConnection::establish(path.to_str().expect("a path of text")).expect("the database is there");
        database.batch_execute("PRAGMA busy_timeout = 10000").expect("a pragma");
        database
    }

    pub fn pipeline_log(&self, meeting: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("storage/pipeline-logs/{meeting}.log"))).unwrap_or_default()
    }

    /// Waits until `probe` finds something; fails after 20 s, naming `what`.
    pub async fn eventually<T, F: Future<Output = Option<T>>>(&self, what: &str, mut probe: impl FnMut() -> F) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            assert!(Instant::now() < deadline, "{what} did not come true; the log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the log has a line that contains `text`.
    pub async fn logged(&self, text: &str) {
        self.eventually(&format!("a log line with {text:?}"), async || self.log().contains(text).then_some(())).await;
    }

    /// One request on a connection of its own.
    pub async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        request(self.addr, method, path, headers, body).await
    }

    /// With the admin key.
    pub async fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[("Authorization", &format!("Bearer {ADMIN_KEY}"))], b"").await
    }

    /// Its answer, when it is another than to come again: a disk that stalls holds the database up.
    async fn come_again(&self, what: &str, ask: impl AsyncFn() -> Response) -> Response {
        self.eventually(&format!("another answer than 503 to {what}"), async || Some(ask().await).filter(|answer| !answer.is_come_again())).await
    }

    /// Waits until `/health` has nothing against the server that would keep it from its work.
    pub async fn healthy(&self) {
        self.eventually("it is healthy", async || (self.get("/health").await.status == 200).then_some(())).await;
    }

    /// What a track's end and webhooks tell is in rows when they are answered, but for a database that takes long: it follows then, and is waited for here.
    pub async fn settled(&self) {
        let waiting = async || self.metric("live_meeting_journal_records").await;
        if waiting().await == 0.0 && !self.log().contains("the rows of a track follow later") {
            return;
        }
        let all_written = async || {
            let (live, rows) = (self.items("/api/v1/tracks/live").await, self.items("/api/v1/recordings").await);
            let is_live = |row: &Value| live.iter().any(|track| ["participant", "trackSid"].iter().all(|name| track[*name] == row[*name]));
            (waiting().await == 0.0 && rows.iter().all(|row| row["endedAt"].is_string() || is_live(row))).then_some(())
        };
        self.eventually("all rows are written", all_written).await;
    }

    /// What becomes of a connection of which the database was asked in time. One that it had no word on ends, and the next is tried.
    pub async fn by_the_databases_word(&self, connect: impl AsyncFn() -> Result<EgressPeer, Refusal>) -> Result<EgressPeer, Refusal> {
        let without = || self.log().matches("without the database's word").count();
        let by_its_word = async || {
            let before = without();
            let outcome = connect().await;
            // Behind its answer the log has come.
            self.metric("live_meeting_journal_records").await;
            if without() == before {
                return Some(outcome);
            }
            if let Ok(peer) = outcome {
                peer.close_and_wait().await;
            }
            None
        };
        self.eventually("the database has its word", by_its_word).await
    }

    /// The JSON of a path that must answer 200.
    pub async fn get_json(&self, path: &str) -> Value {
        let response = self.come_again(path, async || self.get(path).await).await;
        assert_eq!(response.status, 200, "{path}: {}; the log:\n{}", String::from_utf8_lossy(&response.body), self.log());
        response.json()
    }

    /// The items of a list.
    pub async fn items(&self, path: &str) -> Vec<Value> {
        self.get_json(path).await["items"].as_array().expect("items").clone()
    }

    /// A number of `GET /metrics`.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").await;
        assert_eq!(page.status, 200);
        let text = String::from_utf8(page.body).expect("text");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap_or_else(|| panic!("no {name} in\n{text}"));
        value.parse().expect("a number")
    }

    /// The open track of a participant.
    pub async fn live(&self, participant: &str) -> Option<Value> {
        self.items("/api/v1/tracks/live").await.into_iter().find(|track| track["participant"] == participant)
    }

    /// Waits until so much of a participant's audio has arrived.
    pub async fn received(&self, participant: &str, bytes: usize) {
        let arrived = async || (self.live(participant).await?["bytes"].as_u64()? == bytes as u64).then_some(());
        self.eventually(&format!("{bytes} bytes of {participant}"), arrived).await;
    }

    /// Posts JSON with the admin key.
    pub async fn post(&self, path: &str, body: Value) -> Response {
        self.come_again(path, async || self.post_once(path, body.clone()).await).await
    }

    /// The same, whatever the answer is.
    pub async fn post_once(&self, path: &str, body: Value) -> Response {
        let headers = [("Authorization", &*format!("Bearer {ADMIN_KEY}")), ("Content-Type", "application/json")];
        self.request("POST", path, &headers, body.to_string().as_bytes()).await
    }

    /// A ticket for these members of `POST /api/v1/tickets`.
    pub async fn ticket(&self, subject: Value) -> String {
        let response = self.post("/api/v1/tickets", subject).await;
        assert_eq!(response.status, 201, "{}", String::from_utf8_lossy(&response.body));
        response.json()["ticket"].as_str().expect("a ticket").to_owned()
    }

    /// Delivers an event as LiveKit does, which repeats it when it is told to. `event` needs at least `event`; `id` and `createdAt` are added where
    /// they are missing.
    pub async fn webhook(&self, event: Value) -> Response {
        let body = complete(event).to_string();
        self.signed_webhook(body.as_bytes()).await
    }

    /// The same, whatever the answer is.
    pub async fn webhook_once(&self, event: Value) -> Response {
        self.signed_webhook_once(complete(event).to_string().as_bytes()).await
    }

    pub async fn signed_webhook(&self, body: &[u8]) -> Response {
        self.come_again("a webhook", async || self.signed_webhook_once(body).await).await
    }

    async fn signed_webhook_once(&self, body: &[u8]) -> Response {
        let token = sign(API_KEY, API_SECRET, body).expect("signed");
        let headers = [("Authorization", token.as_str()), ("Content-Type", "application/webhook+json"), ("User-Agent", "LiveKit")];
        self.request("POST", "/livekit/webhook", &headers, body).await
    }

    /// `kill -9`, unless it is dead already; the directory stays for the next server.
    pub async fn kill(mut self) -> Stopped {
        self.child.start_kill().ok(); // the dead cannot be killed
        self.child.wait().await.expect("waited for");
        self.stopped().await
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)).expect("the server runs");
        rustix::process::kill_process(pid, signal).expect("signalled");
    }

    /// SIGTERM, and the wait for the end.
    pub async fn terminate(mut self) -> (ExitStatus, Duration, Stopped) {
        let (stalls, start) = (Stalls::watch(self.dir.path(), Wants::Disk), Instant::now());
        self.signal(rustix::process::Signal::TERM);
        let status = tokio::time::timeout(Duration::from_secs(40), self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("the server does not end:\n{}", self.log())).expect("waited for");
        let took = start.elapsed();
        (status, took, Stopped { stall: stalls.longest(), ..self.stopped().await })
    }

    async fn stopped(self) -> Stopped {
        Stopped { dir: Arc::clone(&self.dir), log: self.log(), stall: Duration::ZERO, env: self.env.clone(), args: self.args.clone() }
    }
}

/// A server that has ended, and can be started again as it was.
pub struct Stopped {
    pub dir: Arc<TempDir>,
    pub log: String,
    /// How long the disk let nobody write while it ended.
    stall: Duration,
    env: BTreeMap<String, String>,
    args: Vec<String>,
}

impl Stopped {
    /// Whether it had no time to seal its files or to write its rows, which a disk that stands still for a second may take: each step has 4 s, for 2 or 3
    /// waits for it.
    pub fn is_late(&self) -> bool {
        let tells = ["not sealed in time", "the rows of a track follow later"].iter().any(|words| self.log.contains(words));
        tells && self.stall > Duration::from_secs(1)
    }

    /// As [`TestApp::wav_files`], with nobody at work on them.
    pub fn wav_files(&self) -> Vec<PathBuf> {
        wav_files(&audio_dir(&self.dir))
    }

    /// A start that is killed after a while, be it ready by then or not.
    pub async fn dies_while_it_starts(&self, after: Duration) {
        let mut command = command(self.dir.path(), &self.env);
        let mut child = command.args(&self.args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the server starts");
        tokio::time::sleep(after).await;
        child.kill().await.expect("killed");
    }

    /// Starts it again, and waits until it has finished the files that no row speaks of too, which it does when it listens.
    pub async fn restart(&self) -> TestApp {
        let app = start(command(self.dir.path(), &self.env), Arc::clone(&self.dir), self.env.clone(), self.args.clone()).await;
        app.logged("looked for files that the database does not know").await;
        app
    }
}

/// An event with what LiveKit always says.
pub fn complete(mut event: Value) -> Value {
    let members = event.as_object_mut().expect("an object");
    members.entry("id").or_insert_with(|| json!(format!("EV_{}", uuid::Uuid::new_v4().simple())));
    members.entry("createdAt").or_insert_with(|| json!(chrono::Utc::now().timestamp().to_string()));
    event
}

fn audio_dir(dir: &TempDir) -> PathBuf {
    dir.path().join("storage/egress/audio")
}

fn wav_files(audio_dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = walk(audio_dir).into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "wav")).collect();
    files.sort();
    files
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().flat_map(|entry| if entry.path().is_dir() { walk(&entry.path()) } else { vec![entry.path()] }).collect()
}

/// The sidecar of a file.
pub fn sidecar(path: &Path) -> Option<Value> {
    let text = std::fs::read(format!("{}.json", path.display())).ok()?;
    Some(serde_json::from_slice(&text).expect("a sidecar is whole"))
}

/// The PCM of a WAV file as hound reads it, and its format.
pub fn read_wav(path: &Path) -> (hound::WavSpec, Vec<u8>) {
    let reader = hound::WavReader::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let spec = reader.spec();
    (spec, reader.into_samples::<i16>().flat_map(|sample| sample.expect("a sample").to_le_bytes()).collect())
}
