//! What stands between this server and a real LiveKit, byte for byte and both ways: calls about egress go to another LiveKit, webhooks can be refused,
//! and a test can read what passed.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::clients::serve_each;
use super::http::{Response, parse_response};

const WEBHOOKS: &str = "/livekit/webhook";
const EGRESS: &str = "/twirp/livekit.Egress/";
const REFUSAL: &[u8] = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n";

/// Who is behind it. Each is known only once it has started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Behind {
    pub livekit: Option<SocketAddr>,
    pub egress: Option<SocketAddr>,
    /// The server that webhooks go to; without one they are refused with 500.
    pub webhooks: Option<SocketAddr>,
}

/// A request and its answer.
#[derive(Clone, Debug)]
pub struct Passed {
    pub path: String,
    pub body: Vec<u8>,
    pub answer: Response,
}

#[derive(Default)]
struct Shared {
    behind: Behind,
    passed: Vec<Passed>,
}

/// A running proxy; it ends with the test's runtime.
#[derive(Clone)]
pub struct LiveKitProxy {
    pub addr: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

impl LiveKitProxy {
    pub async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let proxy = Self { addr: listener.local_addr().expect("an address"), shared: Arc::default() };
        let own = proxy.clone();
        tokio::spawn(serve_each(listener, move |client| own.clone().connection(client)));
        proxy
    }

    pub fn tell(&self, tell: impl FnOnce(&mut Behind)) {
        tell(&mut self.shared.lock().unwrap().behind);
    }

    /// Where LiveKit's webhooks go.
    pub fn webhook_url(&self) -> String {
        format!("http://{}{WEBHOOKS}", self.addr)
    }

    /// The calls of a method such as `RoomService/ListRooms`, oldest first.
    pub fn calls(&self, method: &str) -> Vec<Passed> {
        let path = format!("/twirp/livekit.{method}");
        self.shared.lock().unwrap().passed.iter().filter(|passed| passed.path == path).cloned().collect()
    }

    /// The events that LiveKit told, with what each was answered, oldest first. One that is tried again is here again.
    pub fn webhooks(&self) -> Vec<(Value, u16)> {
        let shared = self.shared.lock().unwrap();
        let told = shared.passed.iter().filter(|passed| passed.path == WEBHOOKS);
        told.map(|passed| (serde_json::from_slice(&passed.body).expect("LiveKit speaks JSON"), passed.answer.status)).collect()
    }

    /// One request after the other, each on a connection of its own behind the proxy. A side that goes takes the other with it.
    async fn connection(self, mut client: TcpStream) {
        let mut unread = Vec::new();
        while let Some(request) = message(&mut client, &mut unread).await {
            let (path, body) = parts(&request);
            let behind = self.shared.lock().unwrap().behind;
            let server = match &*path {
                WEBHOOKS => behind.webhooks,
                path if path.starts_with(EGRESS) => Some(behind.egress.expect("there is an egress")),
                _ => Some(behind.livekit.expect("there is a LiveKit")),
            };
            let answer = match server {
                Some(server) => pass_on(server, &request).await,
                None => Some(REFUSAL.to_vec()),
            };
            let Some(answer) = answer else { return };
            self.shared.lock().unwrap().passed.push(Passed { path, body, answer: parse_response(&answer, false) });
            if client.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

/// The answer to a request; `None` is the end of the connection.
async fn pass_on(server: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
    let mut server = TcpStream::connect(server).await.ok()?;
    server.write_all(request).await.ok()?;
    message(&mut server, &mut Vec::new()).await
}

/// The next request or answer, as it came; `None` is the end of the connection.
async fn message(stream: &mut TcpStream, unread: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Some(end) = end(unread) {
            return Some(unread.drain(..end).collect());
        }
        let length = stream.read_buf(unread).await.ok()?;
        if length == 0 {
            return None;
        }
    }
}

/// Where the first message of a text ends, once all of it is there.
fn end(text: &[u8]) -> Option<usize> {
    let body = find(text, b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&text[..body]).to_ascii_lowercase();
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    if field("transfer-encoding") == Some("chunked") {
        return find(&text[body - 2..], b"\r\n0\r\n\r\n").map(|last| body - 2 + last + 7);
    }
    let length: usize = field("content-length").map_or(0, |length| length.parse().expect("a length"));
    (text.len() >= body + length).then_some(body + length)
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

/// The path and the body of a request.
fn parts(request: &[u8]) -> (String, Vec<u8>) {
    let body = find(request, b"\r\n\r\n").expect("a whole request") + 4;
    let head = String::from_utf8_lossy(&request[..body]);
    (head.split(' ').nth(1).expect("a request line").to_owned(), request[body..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_ends_where_its_head_says() {
        for whole in [
            &b"POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"[..],
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ] {
            assert_eq!(end(&whole[..whole.len() - 1]), None);
            assert_eq!(end(&[whole, b"HTTP/1.1 200 OK\r\n\r\n"].concat()), Some(whole.len()));
        }
    }
}
