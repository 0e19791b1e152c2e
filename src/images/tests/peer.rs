//! A real server as the peer: nginx, slowed down, killed in the middle and started again.

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
};

use super::*;

const LEN: usize = 12_000_345;

/// nginx over one directory, at a bounded rate; killed when dropped.
struct Nginx {
    child: Child,
}

impl Nginx {
    /// `None`, and a word why, where nginx is not installed.
    fn start(dir: &Path, port: u16, rate: &str) -> Option<Nginx> {
        let run = dir.join("run");
        std::fs::create_dir_all(&run).unwrap();
        let run = run.display();
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|name| format!("{name}_temp_path {run}/{name};\n"))
            .collect();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {run}/pid;\nerror_log {run}/error;\nevents {{}}\nhttp {{\n\
             access_log {run}/access;\n{paths}server {{ listen 127.0.0.1:{port}; root {}; limit_rate {rate}; }}\n}}\n",
            dir.join("www").display()
        );
        let path = dir.join("nginx.conf");
        std::fs::write(&path, config).unwrap();
        let child = match Command::new("nginx").arg("-c").arg(&path).stderr(Stdio::null()).spawn() {
            Ok(child) => child,
            Err(error) => {
                eprintln!("skipped: nginx does not start ({error}); apt-get install nginx-light");
                return None;
            }
        };
        let nginx = Nginx { child };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "nginx does not answer");
            std::thread::sleep(POLL);
        }
        Some(nginx)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // What is gone already needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_download_from_nginx_survives_its_death_and_fetches_no_synced_byte_twice() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(LEN, 50);
    std::fs::create_dir(dir.path().join("www")).unwrap();
    std::fs::write(dir.path().join("www/disk.raw"), &content).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let Some(slow) = Nginx::start(dir.path(), port, "2m") else { return };

    let mut patient = settings();
    patient.http.stalled_max = PATIENCE;
    let node = Node::with(patient);
    node.create("a", &format!("http://127.0.0.1:{port}/disk.raw"), Some(&sha512(&content))).unwrap();
    let at_death = node
        .until("a", "some bytes", |info| {
            info.copies[0].progress.as_ref().is_some_and(|p| p.done_bytes > 1 << 20)
        })
        .copies[0]
        .progress
        .clone()
        .unwrap()
        .done_bytes;
    drop(slow);
    node.until("a", "a pause", |info| {
        info.copies[0].progress.as_ref().is_some_and(|p| p.last_error.is_some())
    });
    let _fast = Nginx::start(dir.path(), port, "0").unwrap();
    node.wait("a").unwrap();
    assert!(node.content("a") == content);
    // The access log says how much of the body each answer had; the first died unlogged.
    let log = std::fs::read_to_string(dir.path().join("run/access")).unwrap();
    let resumed: u64 = log
        .lines()
        .filter(|line| line.contains("\" 206 "))
        .map(|line| line.split("\" 206 ").nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert!(resumed > 0 && resumed <= LEN as u64 - at_death, "{log}");
}
