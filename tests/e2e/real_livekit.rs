//! The processes: livekit-server, and clients that speak in its rooms. Each ends when its input does, so none outlives the test, however that ends.

use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use livekit_api::access_token::{AccessToken, VideoGrants};
use livekit_api::services::room::RoomClient;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{sleep, timeout};

use crate::support::test_app::{API_KEY, API_SECRET};

/// A client starts slowly on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);
const TICK: Duration = Duration::from_millis(20);
/// A port that was free a moment ago may be another's by now.
const STARTS: usize = 5;
/// Longer than any test: a room ends when a test says so.
const STAYS_EMPTY_S: u32 = 600;
/// Runs a server until its own input ends.
const UNTIL_EOF: &str = r#"exec 3<&0; "$@" & server=$!; { cat <&3 >&2; kill -KILL "$server"; } & wait "$server""#;

/// Where programs are.
pub struct Installed {
    server: PathBuf,
    python: PathBuf,
}

impl Installed {
    pub fn find() -> Option<Self> {
        let dir = PathBuf::from(std::env::var_os("LIVE_MEETING_E2E")?);
        let server = std::env::var_os("LIVEKIT_SERVER").expect("tests/e2e/run sets both").into();
        Some(Self { server, python: dir.join("venv/bin/python") })
    }
}

/// A running livekit-server on loopback, in its development mode.
pub struct RealLiveKit {
    pub addr: SocketAddr,
    python: PathBuf,
    dir: TempDir,
    clients: std::cell::Cell<usize>,
    _input: ChildStdin,
}

impl RealLiveKit {
    pub async fn start(installed: &Installed, webhook_url: &str) -> Self {
        let dir = TempDir::new().expect("a directory");
        for _ in 0..STARTS {
            let [addr, ice_tcp] = free_tcp_ports();
            let ice_udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr()).expect("a port").port();
            let config = format!(
                "port: {}\nbind_addresses: [127.0.0.1]\nkeys: {{{API_KEY}: {API_SECRET}}}\nwebhook: {{api_key: {API_KEY}, urls: [\"{webhook_url}\"]}}\n\
                 room: {{departure_timeout: {STAYS_EMPTY_S}}}\nrtc: {{tcp_port: {}, udp_port: {ice_udp}, use_external_ip: false, node_ip: 127.0.0.1}}\nlogging: {{level: info}}\n",
                addr.port(),
                ice_tcp.port(),
            );
            let config_path = dir.path().join("livekit.yaml");
            std::fs::write(&config_path, config).expect("written");
            let mut command = Command::new("bash");
            command.args(["-c", UNTIL_EOF, "livekit"]).arg(&installed.server).arg("--dev").arg("--config").arg(&config_path);
            let mut child =
                command.stdin(Stdio::piped()).stdout(log(dir.path(), "livekit")).stderr(log(dir.path(), "livekit")).spawn().expect("bash runs");
            let input = child.stdin.take().expect("its input is piped");
            if answers(addr, &mut child).await {
                return Self { addr, python: installed.python.clone(), dir, clients: std::cell::Cell::new(0), _input: input };
            }
        }
        panic!("livekit-server does not start:\n{}", logs(dir.path()));
    }

    /// Its room API, without the proxy.
    pub fn rooms(&self) -> RoomClient {
        RoomClient::with_api_key(&format!("http://{}", self.addr), API_KEY, API_SECRET).with_failover(false)
    }

    /// A client joins, publishes its speech, and stays until it is told to leave.
    pub async fn join(&self, room: &str, guest: Guest<'_>) -> Speaker {
        self.clients.set(self.clients.get() + 1);
        let name = format!("client-{}", self.clients.get());
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(&self.python);
        command.arg(root.join("tests/e2e/publish.py")).args(guest.encrypted.then_some("--encrypted"));
        command.arg(format!("ws://{}", self.addr)).arg(guest.token(room)).arg(root.join("assets").join(guest.speech));
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log(self.dir.path(), &name)).kill_on_drop(true).spawn();
        let mut child = spawned.expect("Python runs");
        let words = BufReader::new(child.stdout.take().expect("its output is piped")).lines();
        let mut speaker = Speaker { sid: String::new(), track: String::new(), child, words };
        speaker.sid = speaker.told("joined").await;
        speaker.track = speaker.told("published").await;
        speaker
    }
}

impl Drop for RealLiveKit {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", logs(self.dir.path()));
        }
    }
}

/// Who joins.
#[derive(Clone, Copy)]
pub struct Guest<'a> {
    pub identity: &'a str,
    pub name: &'a str,
    pub metadata: &'a str,
    pub attribute: (&'a str, &'a str),
    /// A file in `assets`.
    pub speech: &'a str,
    pub encrypted: bool,
}

/// With everything that LiveKit lets an application say of its people.
pub const ANA: Guest<'static> =
    Guest {
        identity: "ana", name: "Ána Müller 🎤", metadata: r#"{"role":"host"}"#, attribute: ("team", "röd"), speech: "ana.wav", encrypted: false
    };

impl Guest<'_> {
    fn token(&self, room: &str) -> String {
        let grants = VideoGrants { room_join: true, room: room.to_owned(), ..VideoGrants::default() };
        let token = AccessToken::with_api_key(API_KEY, API_SECRET).with_identity(self.identity).with_name(self.name);
        token.with_metadata(self.metadata).with_attributes([self.attribute]).with_grants(grants).to_jwt().expect("a token")
    }
}

/// A client in a room.
pub struct Speaker {
    /// Its participant's.
    pub sid: String,
    /// Its track's.
    pub track: String,
    child: Child,
    words: Lines<BufReader<ChildStdout>>,
}

impl Speaker {
    /// The rest of the client's next line, which begins so.
    async fn told(&mut self, what: &str) -> String {
        let line =
            timeout(PATIENCE, self.words.next_line()).await.unwrap_or_else(|_| panic!("the client has not {what}")).expect("its output is text");
        let line = line.unwrap_or_else(|| panic!("the client ended before it {what}"));
        line.strip_prefix(what).unwrap_or_else(|| panic!("{line:?} instead of {what}")).trim().to_owned()
    }

    pub async fn leave(mut self) {
        drop(self.child.stdin.take());
        self.told("left").await;
        let status = timeout(PATIENCE, self.child.wait()).await.expect("the client ends").expect("waited for");
        assert!(status.success(), "{status}");
    }
}

fn free_tcp_ports() -> [SocketAddr; 2] {
    let held = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
    held.map(|listener| listener.local_addr().expect("an address"))
}

/// Waits until it listens; `false` if it ends instead.
async fn answers(addr: SocketAddr, child: &mut Child) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if child.try_wait().expect("waited for").is_some() {
            return false;
        }
        if TcpStream::connect(addr).await.is_ok() {
            return true;
        }
        sleep(TICK).await;
    }
    false
}

fn log(dir: &Path, name: &str) -> Stdio {
    let path = dir.join(format!("{name}.log"));
    std::fs::OpenOptions::new().create(true).append(true).open(path).expect("a log").into()
}

/// What all of them have said.
fn logs(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir).expect("a directory").flatten().map(|entry| entry.path());
    let mut logs = String::new();
    for path in entries.filter(|path| path.extension().is_some_and(|kind| kind == "log")) {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()).into_owned();
        write!(logs, "--- {}\n{text}", path.display()).expect("text takes text");
    }
    logs
}
