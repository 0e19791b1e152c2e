//! A real server as the peer: nginx, slowed down, killed in the middle and started again.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
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
    fn start(dir: &Path, address: SocketAddr, server: &str) -> Option<Nginx> {
        let run = dir.join("run");
        std::fs::create_dir_all(&run).unwrap();
        let run = run.display();
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|name| format!("{name}_temp_path {run}/{name};\n"))
            .collect();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {run}/pid;\nerror_log {run}/error;\nevents {{}}\nhttp {{\n\
             access_log {run}/access;\n{paths}server {{ root {}; {server} }}\n}}\n",
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
        while TcpStream::connect(address).is_err() {
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

/// An address of this machine and one test alone, so that its port stays free until the server takes it, and while the
/// server is dead: the origins of other tests are given ports of 127.0.0.1.
fn free_address(host: &str) -> SocketAddr {
    TcpListener::bind((host, 0)).unwrap().local_addr().unwrap()
}

#[test]
fn a_download_over_tls_needs_a_certificate_that_the_machine_trusts() {
    const CHILD: &str = "BEDPLATE_TEST_TLS";
    if let Ok(url) = std::env::var(CHILD) {
        // This process trusts what SSL_CERT_FILE holds.
        Node::new().bring("a", &url).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("www")).unwrap();
    std::fs::write(dir.path().join("www/disk.raw"), noise(100_000, 51)).unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let config = dir.path().join("openssl.conf");
    let text = "[req]\ndistinguished_name = name\nx509_extensions = leaf\nprompt = no\n[name]\nCN = localhost\n\
                [leaf]\nbasicConstraints = critical,CA:FALSE\nsubjectAltName = IP:127.0.0.2\n";
    std::fs::write(&config, text).unwrap();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .arg("-config")
        .arg(&config)
        .arg("-out")
        .arg(&cert)
        .arg("-keyout")
        .arg(&key)
        .stderr(Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: openssl does not make a certificate; apt-get install openssl");
        return;
    }
    let address = free_address("127.0.0.2");
    let (cert_path, key_path) = (cert.display(), key.display());
    let tls = format!("listen {address} ssl; ssl_certificate {cert_path}; ssl_certificate_key {key_path};");
    let Some(_nginx) = Nginx::start(dir.path(), address, &tls) else { return };
    let url = format!("https://{address}/disk.raw");

    let node = Node::new();
    let untrusted = failure(node.bring("a", &url));
    assert!(untrusted.message.contains("certificate"), "{}", untrusted.message);
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "images::tests::peer::a_download_over_tls_needs_a_certificate_that_the_machine_trusts",
        ])
        .env(CHILD, &url)
        .env("SSL_CERT_FILE", &cert)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_download_from_nginx_survives_its_death_and_fetches_no_synced_byte_twice() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(LEN, 50);
    std::fs::create_dir(dir.path().join("www")).unwrap();
    std::fs::write(dir.path().join("www/disk.raw"), &content).unwrap();
    let address = free_address("127.0.0.3");
    let plain = format!("listen {address};");
    let Some(slow) = Nginx::start(dir.path(), address, &format!("{plain} limit_rate 2m;")) else { return };

    let mut patient = settings();
    patient.http.stalled_max = PATIENCE;
    let node = Node::with(patient);
    node.create("a", &format!("http://{address}/disk.raw"), Some(&sha512(&content))).unwrap();
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
    let _fast = Nginx::start(dir.path(), address, &plain).unwrap();
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
