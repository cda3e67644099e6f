import DiskImage
import Testing

@testable import NBDStorage

@Suite struct NBDNameTests {
    @Test(arguments: [
        ("nbd://host/export", "nbd://host/export"),
        ("nbd+unix:///?socket=/run/s", "nbd+unix:///?socket=/run/s"),
        ("nbd+tcp://host:1/x", "nbd://host:1/x"), ("nbd+tcp://h\u{e9}/", "nbd://h%C3%A9/"),
        ("nbd:host:10809", "nbd://host:10809/"),
        ("nbd:[::1]:10809:exportname=a b", "nbd://[::1]:10809/a%20b"),
        ("nbd:unix:/run/my socket", "nbd+unix:///?socket=/run/my%20socket"),
        ("nbd:unix:/s:exportname=é?", "nbd+unix:///%C3%A9%3F?socket=/s"),
    ])
    func isUnderstood(_ name: String, _ uri: String) throws {
        #expect(try NBDAddress(ImageName(name))?.uri == uri)
        #expect(try NBDAddress(ImageName(name))?.name == name)
    }

    /// A name need not be text, but a URI is ASCII.
    @Test func bytesAreEscaped() throws {
        let unix = ImageName(bytes: Array("nbd:unix:/s".utf8) + [0xe8])
        #expect(try NBDAddress(unix)?.uri == "nbd+unix:///?socket=/s%E8")
        let uri = ImageName(bytes: Array("nbd://h/%20".utf8) + [0xe8])
        #expect(try NBDAddress(uri)?.uri == "nbd://h/%20%E8")
    }

    @Test(arguments: ["disk.raw", "/dev/nbd0", "./nbd:host:1", "nbdkit", ""])
    func isAFile(_ name: String) throws {
        #expect(try NBDAddress(ImageName(name)) == nil)
        #expect(!NBDStorage.isName(ImageName(name)))
    }

    @Test(arguments: ["nbd:", "nbd:host", "nbd:host:", "nbd:host:99999", "nbd:unix:", "nbd::1"])
    func isNotUnderstood(_ name: String) {
        #expect(throws: ImageError.self) { try NBDAddress(ImageName(name)) }
        #expect(NBDStorage.isName(ImageName(name)))
    }

    @Test(arguments: [["nbdkit", "memory", "1G"], ["a", "", "b c", "]"]])
    func serversKeepTheirWords(_ words: [String]) {
        let bytes = words.map { Array($0.utf8) } + [[0xe8, 0xff]]
        #expect(NBDServerCommand(name: NBDServerCommand(bytes).name)?.words == bytes)
    }

    @Test func bracketsAloneAreAFile() {
        #expect(NBDServerCommand(name: "[ nbdkit ]") == nil)
    }
}
