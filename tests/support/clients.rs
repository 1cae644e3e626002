//! Who comes to a listener.

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Serves each client beside the others, for as long as this is polled.
pub async fn serve_each<F: Future<Output = ()> + Send + 'static>(listener: TcpListener, serve: impl Fn(TcpStream) -> F) {
    let mut clients = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.expect("the listener lives");
        clients.spawn(serve(client));
        while clients.try_join_next().is_some() {}
    }
}
