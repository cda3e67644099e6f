import DiskImage
import Testing

@testable import HTTPStorage

@Suite struct HTTPAddressTests {
    @Test func knowsItsNames() {
        #expect(HTTPAddress.isHTTP("http://a/b", isTyped: true))
        #expect(HTTPAddress.isHTTP("HTTPS://a/b", isTyped: false))
        for name: ImageName in ["http:/a", "ftp://a", "httpx://a", "a/http://b", "./http://a"] {
            #expect(!HTTPAddress.isHTTP(name, isTyped: true), "\(name)")
        }
    }

    /// An image may name a file on a server, and no passwords for it.
    @Test func letsOnlyPeopleNamePasswords() throws {
        let name: ImageName = "https://user:p%40ss@host:8443/a@b?c=d"
        #expect(HTTPAddress.isHTTP(name, isTyped: true))
        #expect(!HTTPAddress.isHTTP(name, isTyped: false))
        let address = try HTTPAddress(name)
        #expect(address.credentials == "user:p@ss")
        #expect(address.url == "https://host:8443/a@b?c=d")
        #expect(address.label == "https://host:8443/a@b?…")
        #expect(!HTTPAddress.isHTTP(address.name, isTyped: false))
        #expect(try HTTPAddress(address.name) == address)
        #expect(HTTPAddress.isHTTP("https://host/a@b", isTyped: false))
    }

    @Test(arguments: ["http://", "http:///a", "http://a b/", "http://a/\n"])
    func refusesWhatIsNoAddress(_ name: String) {
        #expect(throws: ImageError.self) { try HTTPAddress(ImageName(name)) }
    }

    @Test func keepsWhatADescriptionAdds() throws {
        var address = try HTTPAddress("http://a/b")
        address.cookie = "x=y"
        address.timeout = 9
        address.isInsecure = true
        #expect(try HTTPAddress(address.name) == address)
    }

    @Test(arguments: [
        ("base.raw", "https://a:1/x/base.raw"), ("../base.raw", "https://a:1/x/../base.raw"),
        ("/y/base.raw", "https://a:1/y/base.raw"),
    ])
    func resolvesPaths(_ path: String, _ expected: String) throws {
        #expect(
            try HTTPAddress("https://a:1/x/over.qcow2?sig=a/b").resolving(HostPath(path))
                == expected)
        #expect(try HTTPAddress("http://a").resolving("b") == "http://a/b")
    }

    @Test func tellsServersApart() {
        #expect(HTTPAddress.origin("https://A:1/x?y") == HTTPAddress.origin("https://a:1/z"))
        #expect(HTTPAddress.origin("https://a/x") != HTTPAddress.origin("http://a/x"))
        #expect(HTTPAddress.origin("https://a/x") != HTTPAddress.origin("https://a:1/x"))
    }
}
