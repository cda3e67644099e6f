import DiskImage
import Testing

@testable import NBDStorage

@Suite struct NBDNameTests {
    @Test(arguments: [
        ("nbd://host/export", "nbd://host/export"),
        ("nbd+unix:///?socket=/run/s", "nbd+unix:///?socket=/run/s"),
        ("nbd:host:10809", "nbd://host:10809/"),
        ("nbd:[::1]:10809:exportname=a b", "nbd://[::1]:10809/a%20b"),
        ("nbd:unix:/run/my socket", "nbd+unix:///?socket=/run/my%20socket"),
        ("nbd:unix:/s:exportname=é?", "nbd+unix:///%C3%A9%3F?socket=/s"),
    ])
    func isUnderstood(_ name: String, _ uri: String) throws {
        #expect(try NBDAddress(name)?.uri == uri)
        #expect(try NBDAddress(name)?.name == name)
    }

    @Test(arguments: ["disk.raw", "/dev/nbd0", "./nbd:host:1", "nbdkit", ""])
    func isAFile(_ name: String) throws {
        #expect(try NBDAddress(name) == nil)
        #expect(!NBDStorage.isName(name))
    }

    @Test(arguments: ["nbd:", "nbd:host", "nbd:host:", "nbd:host:99999", "nbd:unix:", "nbd::1"])
    func isNotUnderstood(_ name: String) {
        #expect(throws: ImageError.self) { try NBDAddress(name) }
        #expect(NBDStorage.isName(name))
    }

    @Test(arguments: [["nbdkit", "memory", "1G"], ["a", "", "b c", "]"]])
    func serversKeepTheirWords(_ words: [String]) {
        #expect(NBDServerCommand(name: NBDServerCommand(words).name)?.words == words)
    }

    @Test func bracketsAloneAreAFile() {
        #expect(NBDServerCommand(name: "[ nbdkit ]") == nil)
    }
}
