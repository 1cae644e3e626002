//! What stands between the server and PostgreSQL: everything passes, but that a connection can be cut where a transaction commits.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::clients::serve_each;

/// How PostgreSQL ends an answer, outside of a transaction.
const READY: &[u8] = b"Z\0\0\0\x05I";

/// What becomes of a transaction whose connection is cut. The client cannot tell one from the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Committed: its answer is lost.
    Answer,
    /// Not committed: the word to do it is lost.
    Commit,
}

/// A running proxy; it ends with the test's runtime.
#[derive(Clone)]
pub struct PostgresProxy {
    addr: SocketAddr,
    behind: Arc<str>,
    /// What is to be cut, by a part of a statement.
    orders: Arc<Mutex<Vec<(Cut, String)>>>,
}

impl PostgresProxy {
    pub async fn start(database_url: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let proxy = Self { addr: listener.local_addr().expect("an address"), behind: authority(database_url).into(), orders: Arc::default() };
        let own = proxy.clone();
        tokio::spawn(serve_each(listener, move |client| own.clone().connection(client)));
        proxy
    }

    /// The database's URL by way of the proxy.
    pub fn url(&self, database_url: &str) -> String {
        database_url.replacen(authority(database_url), &self.addr.to_string(), 1)
    }

    /// Cuts the next transaction with a statement that has this part, once.
    pub fn cut(&self, cut: Cut, statement: &str) {
        self.orders.lock().unwrap().push((cut, statement.to_owned()));
    }

    /// What was ordered and has not come to pass.
    pub fn left(&self) -> Vec<(Cut, String)> {
        self.orders.lock().unwrap().clone()
    }

    /// A side that goes takes the other with it.
    async fn connection(self, mut client: TcpStream) {
        let Ok(mut server) = TcpStream::connect(&*self.behind).await else { return };
        let (mut wire, mut asked, mut answered) = (Wire::default(), Vec::new(), Vec::new());
        loop {
            let passed = tokio::select! {
                read = client.read_buf(&mut asked) => match read {
                    Ok(1..) => self.ask(&mut wire, &mut asked, &mut server).await,
                    _ => None,
                },
                read = server.read_buf(&mut answered) => match read {
                    Ok(1..) => client.write_all(&std::mem::take(&mut answered)).await.ok(),
                    _ => None,
                },
            };
            if passed.is_none() {
                return;
            }
        }
    }

    /// Passes whole messages of the client's on. `None` is the end of the connection.
    async fn ask(&self, wire: &mut Wire, asked: &mut Vec<u8>, server: &mut TcpStream) -> Option<()> {
        while let Some(message) = wire.next(asked) {
            let cut = wire.commits(&message).and_then(|statements| self.cut_of(&statements));
            match cut {
                None => server.write_all(&message).await.ok()?,
                Some(Cut::Commit) => return None,
                Some(Cut::Answer) => {
                    server.write_all(&message).await.ok()?;
                    let mut answer = Vec::new();
                    while !answer.ends_with(READY) && server.read_buf(&mut answer).await.ok()? > 0 {}
                    return None;
                }
            }
        }
        Some(())
    }

    fn cut_of(&self, statements: &[String]) -> Option<Cut> {
        let mut orders = self.orders.lock().unwrap();
        let place = orders.iter().position(|(_, part)| statements.iter().any(|statement| statement.contains(part)))?;
        Some(orders.remove(place).0)
    }
}

/// Host and port.
fn authority(url: &str) -> &str {
    url.split_once('@').and_then(|(_, rest)| rest.split('/').next()).expect("a user and an address")
}

/// What a client has said on a connection.
#[derive(Default)]
struct Wire {
    /// The first message has no type.
    has_begun: bool,
    in_transaction: bool,
    prepared: HashMap<String, String>,
    /// The statements of the transaction that is under way.
    statements: Vec<String>,
}

impl Wire {
    /// The first message of what was read, once all of it is there.
    fn next(&mut self, read: &mut Vec<u8>) -> Option<Vec<u8>> {
        let at = usize::from(self.has_begun);
        let length = u32::from_be_bytes(read.get(at..at + 4)?.try_into().ok()?);
        let end = at + length as usize;
        if read.len() < end {
            return None;
        }
        self.has_begun = true;
        Some(read.drain(..end).collect())
    }

    /// The statements that this message commits, if it does: the word itself, or the end of a statement that stands alone.
    fn commits(&mut self, message: &[u8]) -> Option<Vec<String>> {
        let mut texts = message.get(5..).unwrap_or_default().split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
        let mut text = || texts.next().unwrap_or_default();
        match message.first()? {
            b'P' => {
                let name = text();
                self.prepared.insert(name, text());
            }
            // The portal's name comes first.
            b'B' => self.statements.extend(self.prepared.get(&(text(), text()).1).cloned()),
            b'S' if !self.in_transaction && !self.statements.is_empty() => return Some(std::mem::take(&mut self.statements)),
            b'Q' => {
                let said = std::mem::take(&mut self.statements);
                let query = text();
                self.in_transaction = query == "BEGIN";
                if query == "COMMIT" {
                    return Some(said);
                }
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, texts: &[&str]) -> Vec<u8> {
        let body: Vec<u8> = texts.iter().flat_map(|text| text.bytes().chain([0])).collect();
        [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), &body].concat()
    }

    #[test]
    fn a_commit_has_the_statements_since_its_begin() {
        let mut wire = Wire::default();
        let mut read = [&8_u32.to_be_bytes()[..], b"abcd", &message(b'P', &["s0", "SELECT 1"]), b"B\0"].concat();
        assert_eq!(wire.next(&mut read).unwrap(), [&8_u32.to_be_bytes()[..], b"abcd"].concat());
        let parse = wire.next(&mut read).unwrap();
        assert_eq!((wire.commits(&parse), wire.next(&mut read)), (None, None), "half a message waits for the rest");
        let (sync, bind) = (message(b'S', &[]), message(b'B', &["", "s0"]));
        assert_eq!(wire.commits(&sync), None, "what was only prepared commits nothing");
        assert_eq!((wire.commits(&bind), wire.commits(&sync)), (None, Some(vec!["SELECT 1".to_owned()])));
        let story = [message(b'Q', &["BEGIN"]), bind, sync, message(b'Q', &["COMMIT"])];
        let commits = story.iter().map(|message| wire.commits(message)).collect::<Vec<_>>();
        assert_eq!(commits, [None, None, None, Some(vec!["SELECT 1".to_owned()])]);
    }
}
