//! The fake's HTTP/1.1: connections that stay open between requests, and that can be made to hang, break and be refused.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Shared, twirp};
use crate::support::clients::serve_each;

/// The longest head or body that is waited for.
const MAX_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub content_type: &'static str,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub enum Answer {
    Reply(Reply),
    /// Nothing, until the client goes.
    Hang,
    /// The end of the connection.
    Close,
}

/// A socket on a port of 127.0.0.1; `port` 0 is any. Both the one that keeps the port and the one that listens may have it.
pub fn bind(port: u16) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.set_reuse_port(true).expect("SO_REUSEPORT");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).expect("the port is ours");
    socket
}

/// Listens on a port that [`bind`] holds already.
pub fn listen(port: u16) -> TcpListener {
    let socket = bind(port);
    socket.listen(1_024).expect("listening");
    socket.set_nonblocking(true).expect("a socket can be non-blocking");
    TcpListener::from_std(socket.into()).expect("the runtime has I/O enabled")
}

/// Accepts until it is aborted, and its connections end with it.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let connection = move |stream: TcpStream| {
        stream.set_nodelay(true).ok();
        connection(Arc::clone(&shared), stream)
    };
    serve_each(listener, connection).await;
}

async fn connection(shared: Arc<Shared>, mut stream: TcpStream) {
    let mut unread = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut unread).await {
        match twirp::answer(&shared, &request).await {
            Answer::Reply(reply) => {
                let head = format!(
                    "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n",
                    reply.status,
                    if reply.status == 200 { "OK" } else { "Error" },
                    reply.content_type,
                    reply.body.len()
                );
                let whole = [head.as_bytes(), &reply.body].concat();
                let last = request.headers.get("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
                if stream.write_all(&whole).await.is_err() || last {
                    return;
                }
            }
            Answer::Hang => {
                tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.ok();
                return;
            }
            Answer::Close => return,
        }
    }
}

/// The next request; `None` is the end of the connection.
async fn read_request(stream: &mut TcpStream, unread: &mut Vec<u8>) -> Option<Request> {
    let end = loop {
        if let Some(at) = unread.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        fill(stream, unread).await?;
    };
    let head = String::from_utf8(unread.drain(..end).collect()).expect("a head is text");
    let mut lines = head.split("\r\n");
    let (method, rest) = lines.next()?.split_once(' ')?;
    let path = rest.split(' ').next()?.to_owned();
    let headers: BTreeMap<String, String> =
        lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    let length = headers.get("content-length").map_or(0, |length| length.parse().expect("a length"));
    while unread.len() < length {
        fill(stream, unread).await?;
    }
    Some(Request { method: method.to_owned(), path, headers, body: unread.drain(..length).collect() })
}

async fn fill(stream: &mut TcpStream, unread: &mut Vec<u8>) -> Option<()> {
    assert!(unread.len() < MAX_BYTES, "a request that never ends");
    let length = stream.read_buf(unread).await.ok()?;
    (length > 0).then_some(())
}
